"""The implementations mirror each other: the same files with the same public names, or a reason."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPLEMENTATIONS = ("torch_impl", "tf_impl", "paddle_impl")

HOOKS = {
    "forward",
    "call",
    "build",
    "compute_output_shape",
    "get_config",
    "from_config",
    "apply",
    "update_step",
}
"""Methods that the framework calls: it has named them."""

DIFFERENCES = {
    "clock": {
        "device_clock": "Paddle's plugin devices have no event times: the host's clock stands in",
        "followed": "Paddle's `synchronize` holds the interpreter's lock, so a thread asks",
    },
    "baseline": {"PlainEngine.close": "Paddle's loop leaves nothing behind: its process ends"},
    "cache": {"Held": "what goes into a traced function, and what comes out"},
    "convert": {"Transformer": "a Keras Sequential makes a model of layers without a class"},
    "devices": {
        "fused_attention": "the part of PyTorch's best track; TensorFlow's is a flag, Paddle's in "
        "`programs.py`",
        "check_dtype": "only Paddle lacks bfloat16 kernels",
        "choose_kernels": "TensorFlow reads them on import, which ranks inherit from their parent",
    },
    "dropout": {
        "ElementHashes": "PyTorch's belong to a stream; TensorFlow folds the constants, Paddle's "
        "are in the context"
    },
    "gradient_sum": {
        "OrderedSum": "PyTorch's sums over shards too; Paddle's group over sockets adds in that "
        "order itself, TensorFlow's shards are in one graph",
        "added_up": "TensorFlow's collectives return when they are done: a sum can be a function",
    },
    "layers": {
        "constants": "PyTorch counts the tensors that its graph holds, and these are none of them",
        "Unit": "what Keras asks of every layer: how it is saved, its shapes",
        "Block.split": "its shards are devices of one process; the others' are processes",
        "Embedding.tied_weight": "fleet shares a weight by the name of an attribute",
        "summed_loss": "TensorFlow's loss is the one that the Keras model is compiled with",
    },
    "optimizer": {
        "StageOptimizer.state": "Keras' optimizer has the state of all stages "
        "(`keras_optimizers.moments_of`)",
        "StageOptimizer.load_state": "as above",
        "StageOptimizer.share": "the counterpart: what is one number for all weights goes back to "
        "that optimizer",
    },
    "ranks": {
        "join_pipeline": "a Paddle process alone is a pipeline too, for tests and measurements",
    },
    "stage": {
        "Pass": "a recorded graph reads what a pass over a mini-batch consists of",
        "Stage.loss": "fleet's own schedule calls a loss without saying of which micro-batch",
        "Stage.prepare": "fleet calls layers with their input alone, so their dropout masks are "
        "set before",
    },
}
"""By module: public names that not all three have, each with its reason."""

LEAST_SHARED = 0.90


def modules(implementation: str) -> set[str]:
    files = {path.stem for path in (ROOT / implementation).glob("*.py")}
    return files | {path.parent.name for path in (ROOT / implementation).glob("*/__init__.py")}


def shared_modules() -> list[str]:
    return sorted(set.intersection(*map(modules, IMPLEMENTATIONS)))


@functools.cache
def public_names(implementation: str, module: str) -> list[str]:
    """Functions, classes with their methods, and constants, in the order of the file."""
    names: list[str] = []
    for node in ast.parse((ROOT / implementation / f"{module}.py").read_text()).body:
        match node:
            case ast.FunctionDef():
                names.append(node.name)
            case ast.ClassDef():
                methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                names += [
                    node.name,
                    *(f"{node.name}.{method}" for method in methods if method not in HOOKS),
                ]
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def in_all(module: str) -> set[str]:
    return set.intersection(*(set(public_names(own, module)) for own in IMPLEMENTATIONS))


def test_a_file_that_not_all_have_says_why() -> None:
    for own in IMPLEMENTATIONS:
        for module in modules(own) - set(shared_modules()):
            path = ROOT / own / f"{module}.py"
            source = path if path.exists() else ROOT / own / module / "__init__.py"
            assert "Differs:" in (ast.get_docstring(ast.parse(source.read_text())) or ""), source


def test_a_public_name_that_not_all_have_is_listed_with_a_reason() -> None:
    for module in shared_modules():
        everywhere, listed = in_all(module), DIFFERENCES.get(module, {})
        classes = {name for name in everywhere if "." not in name}
        found = set()
        for own in IMPLEMENTATIONS:
            for name in set(public_names(own, module)) - everywhere:
                # A class that not all have is one difference, with all its methods.
                owner = name.split(".")[0]
                found.add(name if owner in classes else owner)
        assert found == set(listed), module
        assert all(listed.values())


def test_shared_names_stand_in_the_same_order() -> None:
    for module in shared_modules():
        orders = [
            [name for name in public_names(own, module) if name in in_all(module)]
            for own in IMPLEMENTATIONS
        ]
        assert orders[0] == orders[1] == orders[2], module


def test_nearly_all_public_names_are_shared() -> None:
    for own in IMPLEMENTATIONS:
        names = [
            (module, name) for module in shared_modules() for name in public_names(own, module)
        ]
        shared = [name for module, name in names if name in in_all(module)]
        print(f"{own}: {len(shared)} of {len(names)} public names are in all three")
        assert len(shared) / len(names) >= LEAST_SHARED, own
