"""Programs: functions of tensors, compiled once for a machine and kept on disk.

torch.compile traces again in every process and for every set of weights, and looks each call over for longer than a
small draft computes. Here torch.export writes the function down, AOTInductor compiles it into a file under
``build/programs``, and whoever loads the file lends it the weights.
"""

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import put_in_place
from .data import build_dir
from .train import source_key

_SOURCES = source_key("sampling", "model", "programs", "passes", "products", "compiled")


class Program:
    """``module`` for tensors such as ``inputs()`` returns, on the CPU.

    ``shapes`` says which sizes may differ between calls, as torch.export's ``dynamic_shapes``. ``parts`` is whatever
    else the compiled code depends on, such as the sizes of a model; weights are read where ``module`` has them, and
    are not part of the file. It is called with the tensors in order, without their nesting.
    """

    def __init__(self, name: str, parts: object, module: nn.Module, inputs: Callable[[], tuple], shapes=None,
                 threads: int | None = None):  # fmt: skip
        path = program_path(name, parts, threads)
        if not path.exists():
            build(module, inputs, shapes, threads or torch.get_num_threads(), path)
        self.package = torch._inductor.aoti_load_package(str(path))
        weights = dict(module.named_parameters()) | dict(module.named_buffers())
        self.weights = {name: weights[name].detach() for name in self.package.get_constant_fqns()}  # lent, so kept alive
        self.package.load_constants(self.weights, check_full_update=True, user_managed=True)
        self.run: Callable[[list[Tensor]], list[Tensor]] = self.package.loader.boxed_run

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        return self.run(list(tensors))


def program_path(name: str, parts: object, threads: int | None = None) -> Path:
    """Where the program is kept: another machine, torch or source of this package has another one."""
    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), threads or torch.get_num_threads()
    key = hashlib.sha256(repr((_SOURCES, machine, parts)).encode()).hexdigest()[:12]
    return build_dir() / "programs" / f"{name}-{key}.pt2"


def build(module: nn.Module, inputs: Callable[[], tuple], shapes, threads: int, path: Path) -> None:
    """Compile into ``path``, which is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "cpp.threads": threads,
        "cpp.enable_floating_point_contract_flag": "fast",  # multiply and add in one instruction
        "aot_inductor.package_constants_in_so": False,
        "cpp.min_chunk_size": 2048,  # numbers for which a second thread is worth waking
        "always_keep_tensor_constants": True,  # or a weight of up to 8 numbers would become part of the code
    }
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about itself
        with torch.inference_mode(False), torch.no_grad():
            exported = torch.export.export(module, inputs(), dynamic_shapes=shapes)
            part = torch._inductor.aoti_compile_and_package(
                exported, package_path=str(Path(folder) / "program.pt2"), inductor_configs=options
            )
        put_in_place(Path(part), path)
