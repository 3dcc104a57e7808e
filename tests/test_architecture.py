"""The house's floors: imports go down only, and a few libraries stay in their rooms. A new module gets a floor here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "litlora"
FLOORS = [  # from the top down; rooms of one floor may use each other, but in no circle
    "__main__ cli completion",
    "commands",
    "load decode decode_graph engine few_rows train fabric merge merge_verify merge_write answers memory precision "
    "optimizers run_files resume hub meta_format flops report loggers model_card samples graphs pace",
    "peft_format model packing sampling meta_tokenizer deltas",
    "lora sequences kv_cache data recompute",
    "frozen checkpoint ops config tokenizer metrics markdown expressions flat_yaml transfer",
    "errors",
]
APART = [("model", "lora"), ("model", "frozen"), ("model", "checkpoint"), ("lora", "model")]
LIBRARIES = {  # and the rooms they stay in
    "lightning_fabric": "fabric loggers",
    "matplotlib": "report",
    "wandb": "loggers",
    "bitsandbytes": "frozen optimizers",
    "jsonargparse": "cli",
    "huggingface_hub": "hub data",
    "sentencepiece": "tokenizer meta_tokenizer",
    "tokenizers": "tokenizer meta_tokenizer",
    "transformers": "",
    "peft": "",
    "safetensors": "",
}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
MODULES = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): file
           for file in sorted(ROOT.rglob("*.py"))}  # fmt: skip


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported when the code runs, in functions too; not those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def module_of(name: str) -> str:
    """litlora.errors.InputError -> litlora.errors"""
    return name if name in MODULES or "." not in name else module_of(name.rpartition(".")[0])


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


NAMES = {module: sorted(set(imports(ast.parse(file.read_text())))) for module, file in MODULES.items()}
GRAPH = {m: {module_of(n) for n in names if n.startswith("litlora")} - {m, "litlora"} for m, names in NAMES.items()}


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    assert {room(module) for module in MODULES} - {""} == set(FLOOR), "give a new module a floor in FLOORS above"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_imports_go_down_only(module: str) -> None:
    here = room(module)
    assert not [other for other in GRAPH[module] if FLOOR[room(other)] < FLOOR[here]], "an import from a floor above"
    assert not [other for other in GRAPH[module] if (here, room(other)) in APART], "two that do not know each other"
    libraries = {name.split(".")[0] for name in NAMES[module]} & LIBRARIES.keys()
    assert not [name for name in libraries if here not in LIBRARIES[name].split()], "a library outside its rooms"


def test_no_circle() -> None:
    """Peels off what imports nothing that is left; a circle stays."""
    left = {module: set(others) for module, others in GRAPH.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle among {sorted(left)}"


def test_the_eyes_are_open() -> None:
    """An import written in any way is seen."""
    code = "import a.b\nfrom c import d\ndef f():\n  import e\nif TYPE_CHECKING:\n  import g\nelse:\n  import h\n"
    assert list(imports(ast.parse(code))) == ["a.b", "c.d", "e", "h"]
    assert "litlora.errors" in GRAPH["litlora.frozen"]
    assert "litlora.packing" not in GRAPH["litlora.model"]
