"""Expressions and the table of their operations. (Whichever module is imported first, the table is full.)"""

import surgery.ir.operations  # noqa: F401
