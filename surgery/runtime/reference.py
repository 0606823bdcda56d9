"""The base model of an operated one as a module of its own, without a second copy of it.

Takes a surgeon; gives what trainers of preferences ask for as a reference model. Promises: whatever runs as a call of
it runs with the surgery off; it holds no parameters, so that nothing shards, saves or trains them twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.models.modes import in_mode

if TYPE_CHECKING:
    from surgery.runtime.surgeon import Surgeon


class Reference(nn.Module):
    """Its attributes are the model's, and its calls are those of the base model in a mode of their own: in evaluation,
    unless `train()` says otherwise, whatever the model is in meanwhile."""

    def __init__(self, surgeon: Surgeon):
        super().__init__()
        self.training = False
        object.__setattr__(self, "surgeon", surgeon)  # no child: the parameters are the model's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["surgeon"].model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # around the call and not in `forward`, in the place of which a trainer may put one of its own
        surgeon: Surgeon = self.__dict__["surgeon"]
        with surgeon.disabled(), in_mode(surgeon.model, self.training):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["surgeon"].model(*args, **kwargs)
