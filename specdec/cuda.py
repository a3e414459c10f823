"""Short passes on a GPU, each one launch of a kernel of native.cu, sampling.cu and draft.cu: a pass, a draft of several
tokens, rows of probabilities, a decision. What `compiled.py` is for the CPU, on CUDA tensors, with weights in bfloat16.
Nothing here waits for the device.
"""

import ctypes
from ctypes import Structure, addressof, byref, c_char, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .model import NO_TOKENS, KVCache, Transformer, of_one_text
from .native import SIZES, Layer, Whole
from .sampling import Randomness, Rule, Sampling, as_written, block

MOST, LAYERS, THREADS = 16, 64, 512  # most rows of a pass and layers of a model; threads of a block
STATIC = 3584  # bytes of shared memory, at least what native.cu declares by itself
CLUSTER, KEYS = 16, 4  # blocks of a cluster; keys of a warp of draft.cu, most
BLOCKS = 160  # of a launch, most
DRAFTS = 31  # of a round, most that the kernel decides on
FIRST = 512  # bytes of shared memory before `rest` in native.cu
SOURCES = [Path(__file__).with_name(name) for name in ("native.cu", "sampling.cu", "draft.cu")]
ARGUMENTS = {
    "run": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int, c_double, c_void_p, c_void_p, c_void_p, c_int),
    "draft": (
        c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, c_int, c_double, c_void_p, c_void_p, c_void_p, c_int, c_int,
    ),
    "probabilities": (c_void_p, c_int64, c_int, c_int, c_double, c_void_p, c_void_p, c_int),
    "decide": (c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_int),
}


class _Config(Structure):
    """CUlaunchConfig: (blocks, 1, 1), (threads, 1, 1), bytes of shared memory, stream, attributes."""

    _fields_ = [*((f"n{i}", c_uint) for i in range(7)), ("stream", c_void_p), ("attributes", c_void_p), ("n", c_uint)]


class _ClusterSize(Structure):
    """The CUlaunchAttribute of (blocks, 1, 1) a cluster."""

    _fields_ = [("kind", c_int), ("pad", c_int), ("x", c_uint), ("y", c_uint), ("z", c_uint), ("rest", c_char * 52)]


def compiled(device: torch.device, shared: int) -> bytes:
    """The kernels for ``device``, whose launches ask for ``shared`` bytes, in about five seconds."""
    try:
        nvrtc = ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")
    except OSError:  # where pip puts it
        nvrtc = ctypes.CDLL(str(next(Path(torch.__file__).parents[1].glob("nvidia/**/libnvrtc.so.*"))))
    major, minor = torch.cuda.get_device_capability(device)
    source = "\n".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in SOURCES[: 3 if major >= 9 else 2])
    program, size = c_void_p(), c_size_t()
    nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"specdec.cu", 0, None, None)
    # the last: what multiplies and adds in one instruction says so itself, so that it does in any company
    options = (
        f"-DTHREADS={THREADS} -DSHARED={shared} -DKEYS={KEYS} -DBLOCKS={BLOCKS} --gpu-architecture=sm_{major}{minor} -std=c++17 "
        "--fmad=false"
    ).split()
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*(o.encode() for o in options)))
    what = "nvrtcGetProgramLog" if failed else "nvrtcGetCUBIN"
    getattr(nvrtc, f"{what}Size")(program, byref(size))
    out = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, what)(program, out)
    nvrtc.nvrtcDestroyProgram(byref(program))
    if failed:
        raise RuntimeError(f"the kernels do not compile:\n{out.value.decode()}")
    return out.raw


class Kernels:
    """The kernels, loaded on ``device``."""

    threads, cluster, keys = THREADS, CLUSTER, KEYS

    def __init__(self, device: torch.device):
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # now there is a context to load them into
            properties = torch.cuda.get_device_properties(device)
            self.device, self.blocks = device, min(BLOCKS, properties.multi_processor_count)
            self.most = properties.shared_memory_per_block_optin - STATIC  # bytes that a launch may ask for
            self.driver, self.module, self.functions = ctypes.CDLL("libcuda.so.1"), c_void_p(), {}
            self.check(self.driver.cuModuleLoadData(byref(self.module), compiled(device, self.most)))
            self.configurations, has_clusters = {}, properties.major >= 9
            for name in ARGUMENTS:
                if name == "draft" and not has_clusters:
                    continue
                function = self.functions[name] = c_void_p()
                self.check(self.driver.cuModuleGetFunction(byref(function), self.module, f"specdec_{name}".encode()))
                self.check(self.driver.cuFuncSetAttribute(function, 8, self.most))  # MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.clusters = self.count_clusters() if has_clusters else 0

    def count_clusters(self) -> int:
        """How many clusters of draft.cu can wait for each other."""
        function, n = self.functions["draft"], c_int()
        self.check(self.driver.cuFuncSetAttribute(function, 14, 1))  # NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        config = self.configuration(self.cluster, self.cluster)
        self.check(self.driver.cuOccupancyMaxActiveClusters(byref(n), function, byref(config)))
        return min(n.value, BLOCKS // self.cluster)

    def configuration(self, blocks: int, cluster: int) -> _Config:
        """The same object whenever a launch is alike, because to make one takes longer than to fill in a stream."""
        if (blocks, cluster) not in self.configurations:
            size = _ClusterSize(4, 0, cluster, 1, 1)  # CLUSTER_DIMENSION
            config = _Config(blocks, 1, 1, self.threads, 1, 1, self.most, None, addressof(size), cluster > 1)
            self.configurations[blocks, cluster] = config, size
        config, _ = self.configurations[blocks, cluster]
        config.stream = torch.cuda.current_stream(self.device).cuda_stream
        return config

    def check(self, error: int) -> None:
        if error:
            text = c_char_p()
            self.driver.cuGetErrorString(error, byref(text))
            raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}.")

    def launch(self, name: str, blocks: int, arguments, cluster: int = 1) -> None:
        config = self.configuration(blocks, cluster)
        self.check(self.driver.cuLaunchKernelEx(byref(config), self.functions[name], arguments, None))


kernels = cache(Kernels)


class Call:
    """Arguments of a kernel, laid out once and filled in for each launch."""

    def __init__(self, kernels: Kernels, name: str, *first: Structure):
        self.kernels, self.name, self.first = kernels, name, first
        self.values = [kind() for kind in ARGUMENTS[name]]
        places = [addressof(x) for x in (*first, *self.values)]
        self.places = (c_void_p * len(places))(*places)

    def __call__(self, blocks: int, *arguments, cluster: int = 1) -> None:
        for place, argument in zip(self.values, arguments, strict=True):
            place.value = argument.data_ptr() if isinstance(argument, Tensor) else argument
        self.kernels.launch(self.name, blocks, self.places, cluster)


class Shared(Call):
    """A kernel without a model, whose blocks tell each other something; its last two arguments are added here."""

    def __init__(self, kernels: Kernels, name: str, device: torch.device):
        super().__init__(kernels, name)
        self.posts, self.epoch = torch.zeros((DRAFTS + 1) * BLOCKS * 2, dtype=torch.long, device=device), 0

    def __call__(self, blocks: int, *arguments) -> None:
        self.epoch += 1
        super().__call__(blocks, *arguments, self.posts, self.epoch)


@cache
def call(name: str, device: torch.device) -> Shared:
    return Shared(kernels(device), name, device)


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in SIZES),
        ("norm_eps", c_double),
        *((name, c_void_p) for name in (
            "embedding", "cos", "sin", "norm", "head", "offered", "drawn", "x", "queries", "mixed", "inner", "logits", "next", "posts",
            "words", "meeting",
        )),
        ("layers", Layer * LAYERS),
    ]  # fmt: skip


class CudaModel(Whole):
    """``model`` for decoding, called like the model itself. Any number of tokens is read as passes of at most 16 rows.

    The logits of a token are the same bits whatever tokens are read with it. All work of this process on a device is to be on one
    stream: the blocks of a kernel wait for each other, and two such kernels at once could wait forever.
    """

    def __init__(self, model: Transformer):
        config, C, F = model.config, model.config.width, 4 * model.config.width
        if model.dtype != torch.bfloat16:
            raise ValueError(f"CUDA passes do not know {model.dtype}; choose bfloat16, or graphs.")
        self.config, self.device, self.dtype, self.offered = config, model.device, model.dtype, model.offered
        self.kernels = kernels(model.device)
        self.n_offered = len(model.head.weight)
        self.n_choices = min(self.n_offered, config.n_ids)
        D = config.head_size
        warps = self.kernels.threads // 32
        room = max(
            4 * (D + 2) * warps, 4 * -(-self.n_choices // self.kernels.blocks), 4 * MOST * (4 * C + 4 + 8 * warps),
            4 * MOST * (C + 4 + 24 * warps),
        )  # fmt: skip
        if C % 8 or not 4 <= D <= 256 or config.n_layers > LAYERS or FIRST + room > self.kernels.most:
            raise ValueError(
                f"CUDA passes are for up to {LAYERS} layers, of widths that 8 divides, up to 856 on an H100; "
                f"{config.n_layers} of {C} were given: choose graphs."
            )
        self.kept: list[Tensor] = []  # what the pointers point to

        def at(tensor: Tensor, dtype=torch.float32) -> int:
            self.kept.append(tensor.detach().to(dtype).contiguous())
            return self.kept[-1].data_ptr()

        def weight(linear) -> int:
            return at(linear.weight, torch.bfloat16)

        def room(n: int, dtype=torch.float32) -> int:
            return at(torch.zeros(n, dtype=dtype, device=model.device), dtype)

        layers = (
            Layer(at(b.attention_norm.weight), weight(b.attention.qkv), weight(b.attention.out), at(b.mlp_norm.weight),
                  weight(b.mlp.up), weight(b.mlp.down))
            for b in model.blocks
        )  # fmt: skip
        struct = _Model(
            config.n_layers, config.n_heads, config.n_kv_heads, config.head_size, C, F, config.vocab_size, self.n_offered,
            self.n_choices, config.activation == "relu2", config.context, config.norm_eps,
            weight(model.embedding), at(model.cos), at(model.sin), at(model.norm.weight), weight(model.head),
            None if model.offered is None else at(model.offered, torch.long),
            weight(model.embedding) if model.offered is None else at(model.embedding.weight[model.offered], torch.bfloat16),
            room(MOST * C), room(MOST * C), room(MOST * C), room(MOST * F), room(self.n_offered), room(1, torch.long),
            room(4 * BLOCKS, torch.long), room(2 * self.n_choices, torch.long), room(1, torch.int32), (Layer * LAYERS)(*layers),
        )  # fmt: skip
        self.run = Call(self.kernels, "run", struct)
        self.draft = Call(self.kernels, "draft", struct) if self.fits_a_cluster() else None
        self.epoch = 1  # of the next token that is drawn

    def fits_a_cluster(self) -> bool:
        """Whether draft.cu can draw from this model: see there what lies in shared memory."""
        c, n, warps = self.config, self.kernels.cluster, self.kernels.threads // 32
        C, D, H, K = c.width, c.head_size, c.n_heads, c.n_kv_heads
        Q, F, L, parts = (H + 2 * K) * D, 4 * C, c.n_layers, n // K
        in_order = self.offered is None or bool((self.offered.diff() > 0).all())
        if not in_order or not self.kernels.clusters or D > 64 or H // K > 4 or any(x % n for x in (Q // 2, C, F // 4)):
            return False
        weights = L * (Q * C + C * C + 2 * F * C) // n * 2
        numbers = (2 * L + 1) * C + C + Q + C + F + (H * parts + warps * (H // K)) * (D + 2)
        numbers += 2 * -(-self.n_choices // (n * self.kernels.clusters)) + 6 + 4 * Q // 2 // n + D + 2 * C
        return c.context <= parts * warps * self.kernels.keys and FIRST + weights + 4 * numbers <= self.kernels.most

    def new_cache(self) -> KVCache:
        return KVCache(self.config, 1, None, torch.float32, self.device)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (1, T, V) for ids (1, T), which continue the text in ``cache`` and are added to it."""
        logits = torch.empty(1, ids.shape[1], self.n_offered, device=self.device)
        self.read(ids, cache, logits[0])
        return logits

    def read(self, ids: Tensor, cache: KVCache, logits: Tensor | None = None) -> None:
        """The same without the output layer, unless there is a place (T, V) for ``logits``."""
        T, ids = ids.shape[1], self._long(ids)
        start = cache.append(T)
        for i in range(0, T, MOST):
            rows, place = min(MOST, T - i), None if logits is None else logits[i:]
            where = cache.k, cache.v, ids[i:], rows, start + i, place
            self.run(self.kernels.blocks, *where, 0, 0, None, None, None, 0)

    def probs(self, ids: Tensor, cache: KVCache, sampling: Sampling) -> Tensor:
        return cuda_probs(self(ids, cache)[0, :, : self.n_choices], sampling)

    def draw(
        self, ids: Tensor, cache: KVCache, sampling: Sampling, randomness: Randomness, n: int = 1
    ) -> tuple[Tensor, Tensor]:
        if ids.shape[1] > MOST:  # a prompt
            self.read(ids[:, :-1], cache)
            ids = ids[:, -1:]
        if sampling.filters:
            return super().draw(ids, cache, sampling, randomness, n)
        rows, ids = ids.shape[1], self._long(ids)
        start = cache.append(rows + n - 1)
        tokens = torch.empty(n, dtype=torch.long, device=self.device)
        probs = torch.empty(n, self.n_choices, device=self.device)
        self.run(
            self.kernels.blocks, cache.k, cache.v, ids, rows, start, None, n, sampling.temperature, randomness.uniforms(n),
            tokens, probs, self.epoch,
        )  # fmt: skip
        self.epoch += n
        return tokens, probs

    def propose(
        self, unread: list[int], cache: KVCache, sampling: Sampling, randomness: Randomness, n: int
    ) -> tuple[Tensor, Tensor]:
        """By clusters of blocks, where that can be."""
        if self.draft is None or sampling.filters:
            return super().propose(unread, cache, sampling, randomness, n)
        if not unread:
            raise ValueError(NO_TOKENS)
        if len(unread) > 2:  # a prompt
            self.read(torch.tensor([unread[:-1]]), cache)
            unread = unread[-1:]
        rows, size = len(unread), self.kernels.cluster
        start = cache.append(rows + n - 1)
        tokens = torch.empty(n, dtype=torch.long, device=self.device)
        probs = torch.empty(n, self.config.n_ids, device=self.device)
        self.draft(
            self.kernels.clusters * size, cache.k, cache.v, unread[0], unread[-1], rows, start, n, sampling.temperature,
            randomness.uniforms(n), tokens, probs, self.config.n_ids, self.epoch, cluster=size,
        )  # fmt: skip
        self.epoch += n
        return tokens, probs

    def _long(self, ids: Tensor) -> Tensor:
        """ids (1, T) → (T,) on the device, as they lie in memory."""
        return of_one_text(ids)[0].to(self.device, torch.long, non_blocking=True).contiguous()


def cuda_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """`Sampling.probs_or_nan` of rows (R, V) in float32 as one launch."""
    launch, (rows, n) = call("probabilities", logits.device), logits.shape
    blocks, room = launch.kernels.blocks // max(1, rows), launch.kernels.most - 4096  # of a row
    if sampling.filters or not rows or not blocks or -(-n // blocks) * 4 > room:
        return sampling.probs_or_nan(logits)
    probs = torch.empty(rows, n, device=logits.device)
    launch(rows * blocks, logits, logits.stride(0), n, rows, sampling.temperature, probs)
    return probs


def cuda_rule(
    rule: Rule, drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, randomness: Randomness
) -> tuple[Tensor, Tensor]:
    """``rule``, `token_wise` or `block`, as one launch: the same tokens for the same random numbers."""
    if not (
        0 < len(drafted) <= DRAFTS and draft_probs.dtype == target_probs.dtype == torch.float32 and as_written(randomness)
    ):
        return rule(drafted, draft_probs, target_probs, randomness)
    k, n = draft_probs.shape
    rows = [x.contiguous() for x in (drafted, draft_probs, target_probs, randomness.uniforms(k + 1))]
    decision = torch.empty(2, dtype=torch.long, device=drafted.device)
    decide = call("decide", drafted.device)
    decide(decide.kernels.blocks, *rows, k, n, rule is block, decision)
    return decision[0], decision[1:]
