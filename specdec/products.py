"""Linear layers for a few rows, at the speed of memory: the one place where the report leaves Python (products.cpp)."""

import ctypes
import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import put_in_place
from .data import build_dir

LANES, MOST = 8, 32  # as in products.cpp: outputs of a panel, most rows
DTYPES = torch.float32, torch.float64
_SOURCE = Path(__file__).with_suffix(".cpp")
_SHIM = "AOTITorchError aoti_torch_cpu_few_rows(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle* y)"


class PanelLinear(nn.Module):
    """A Linear of `DTYPES` for up to 32 rows, its weight laid out as panels (N/8, C, 8) of 8 outputs."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()  # (N, C)
        if weight.dtype not in DTYPES:
            raise ValueError(f"panels are of float32 or float64, not of {weight.dtype}; use another Linear.")
        self.n_outputs = len(weight)
        panels = F.pad(weight, (0, 0, 0, -len(weight) % LANES)).view(-1, LANES, weight.shape[1])
        self.panels = nn.Parameter(panels.transpose(1, 2).contiguous(), requires_grad=False)
        load()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > MOST:
            raise ValueError(f"{len(rows)} rows are too many for panels; give at most {MOST}.")
        y = torch.ops.specdec.few_rows(rows.contiguous(), self.panels)
        return y[:, : self.n_outputs].view(*x.shape[:-1], -1)


@cache
def load() -> None:
    """Make ``torch.ops.specdec.few_rows`` known, compiled for this machine once."""
    from torch._inductor import config  # not above: it takes seconds to import
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), _SOURCE.read_text()
    key = hashlib.sha256(repr(machine).encode()).hexdigest()[:12]
    path = build_dir() / "programs" / f"products-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        contract = {"cpp.enable_floating_point_contract_flag": "fast"}  # multiply and add in one instruction
        # not in the project's own folders, whose names may have spaces
        with tempfile.TemporaryDirectory() as folder, config.patch(contract):
            source = shutil.copy(_SOURCE, folder)
            builder = CppBuilder("products", source, CppTorchOptions(), folder)
            builder.build()
            partial = shutil.copy(builder.get_target_file_path(), path.with_suffix(f".{os.getpid()}"))
            put_in_place(partial, path)
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # its symbols are for the programs that call it
    torch.library.register_fake("specdec::few_rows", lambda x, panels: x.new_empty(len(x), len(panels) * LANES))
    config.aot_inductor.custom_ops_to_c_shims |= {torch.ops.specdec.few_rows.default: [_SHIM]}
