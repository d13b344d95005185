"""What is checked of declarations that are not maps: solvers and paths."""
