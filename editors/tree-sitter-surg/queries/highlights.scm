; Written by `python tests/editor/test_tree_sitter.py` from grammar/surg.lark.
(comment) @comment
(string) @string
(number) @number
(call . (name) @function.call)
(keyword . (name) @variable.parameter)
(transform . (name) @function)
(update . (name) @function)
(header . (name) @module)
(select . (name) @constant)
(param (name) @variable.parameter)
(let . (name) @variable)
(noise . (name) @variable)
(parameter . (name) @variable.parameter)

["use" "spec" "check" "select" "train" "transform" "update" "param" "frozen" "shared" "let" "return" "override" "target" "except" "if" "then" "else" "language" "on" "with" "bias" "dropout" "for" "in" "noise" "rate" "no" "decay" "stiefel" "module" "layer" "model" "shifted" "untie" "out"] @keyword
["pre" "add" "post"] @keyword.function
["or" "and" "not"] @keyword.operator
["true" "false"] @boolean
["linear" "conv" "embedding" "norm" "any" "int" "float" "bool" "str"] @type.builtin
["<=" ">=" "==" "!=" "<" ">" "+" "-" "*" "/" "@" ".T" ".."] @operator
