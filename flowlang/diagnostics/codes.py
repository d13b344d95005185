"""The table of codes: never renumbered, never reused. Each has a page in `pages/CODE.md`."""

from __future__ import annotations

CODES: dict[str, str] = {
    # 01 text and syntax
    "FL0101": "syntax-error",
    "FL0102": "unclosed-bracket",
    "FL0103": "bad-character",
    "FL0104": "bad-number",
    "FL0105": "unknown-edition",
    "FL0106": "misplaced-statement",
    # 02 names, arguments, declarations
    "FL0201": "unknown-name",
    "FL0202": "unknown-argument",
    "FL0203": "missing-argument",
    "FL0204": "duplicate-name",
    "FL0205": "recursion",
    "FL0206": "shadowed-axis",
    "FL0207": "unknown-import",
    "FL0208": "import-cycle",
    "FL0209": "unused-value",
    "FL0210": "unused-name",
    "FL0211": "wrong-kind",
    "FL0212": "incomplete-flow",
    "FL0213": "library-name-shadowed",
    "FL0214": "shared-network",
    # 03 types, axes, sizes
    "FL0301": "size-mismatch",
    "FL0302": "unknown-axis",
    "FL0303": "unrelated-axes",
    "FL0304": "unsized-network",
    "FL0305": "static-expected",
    "FL0306": "wrong-type",
    "FL0307": "bad-axes",
    "FL0308": "result-mismatch",
    "FL0309": "optional-value",
    "FL0310": "free-size",
    "FL0311": "bad-domain",
    "FL0312": "indivisible",
    # 04 invertibility, domains, support
    "FL0401": "arrives-twice",
    "FL0402": "dimension-lost",
    "FL0403": "condition-unproved",
    "FL0404": "not-monotone",
    "FL0405": "not-continuous",
    "FL0406": "not-causal",
    "FL0407": "not-contractive",
    "FL0408": "support-mismatch",
    "FL0409": "not-total",
    "FL0410": "unbalanced-draw",
    "FL0411": "batch-coupled",
    "FL0412": "explicit-rule-wrong",
    "FL0413": "explicit-rule-unverified",
    "FL0414": "not-onto",
    # 05 Jacobian, requirements
    "FL0501": "log-det-too-costly",
    "FL0502": "requirement-failed",
    # 06 solvers and paths
    "FL0601": "order-not-reached",
    "FL0602": "bad-solver",
    "FL0603": "endpoint-missed",
    "FL0604": "path-not-smooth",
    "FL0605": "may-escape",
    # 07 backends and run time
    "FL0701": "cannot-lower",
    "FL0702": "bad-input",
    "FL0703": "verification-failed",
    # 08 files, data, training
    "FL0801": "cannot-read",
    "FL0802": "bad-data",
    "FL0803": "bad-checkpoint",
    "FL0804": "bad-option",
    "FL0805": "missing-extra",
    "FL0806": "diverged",
    # 09 limits, and what is not there yet
    "FL0901": "limit-exceeded",
    "FL0902": "not-yet",
}
