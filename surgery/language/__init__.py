"""The language: text to the tree of a spec and back.

Joins the nodes with the modules that parse, check and print them.
"""

from surgery.language import formatter, library, parser, well_formed
from surgery.language.registry import Registered

Registered.parse_expression = parser.parse_expression
Registered.expression_text = formatter.expression_text
Registered.check_spec = well_formed.check_spec
Registered.spec_text = formatter.spec_text
Registered.retarget = library.retarget
