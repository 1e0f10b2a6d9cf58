"""The CUDA kernels without Rust: checked against float64 and timed next to PyTorch and other landmark kernels, on a machine with a GPU,
nvcc and PyTorch. For work on the kernels; the crate's own tests are `cargo test --features cuda`.

    python3 benches/cuda_kernels.py --build                          # nvcc, for this GPU, into a temporary folder
    python3 benches/cuda_kernels.py --check 300 --golden tests/golden --same
    python3 benches/cuda_kernels.py --bench --authors DIR --olmo DIR

DIR: `llama/ltriton` of epfml/landmark-attention, and `src/olmo_core/nn/attention` of allenai/OLMo-core (commit a2a5b2d29).
`units_of` and `blocks_of` are the tables of `src/cuda/units.rs`.
"""

import argparse
import ctypes
import glob
import importlib
import os
import random
import subprocess
import sys
import tempfile

import numpy as np
import torch

DEV = "cuda"
SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../crates/landmark-attention/src/cuda")
BUILT = os.path.join(tempfile.gettempdir(), "landmark-cuda-kernels")
BEYOND = 1 << 30
VP = ctypes.c_void_p


class Strides(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("step", ctypes.c_int64)]


class Params(ctypes.Structure):
    _fields_ = (
        [(n, VP) for n in "q k v dout out lse dq dk dv rows stats units first_unit blocks views".split()]
        + [(n, Strides) for n in "q_strides k_strides v_strides dout_strides".split()]
        + [(n, ctypes.c_int32) for n in "batch heads kv_heads q_len kv_len head_dim q_pad max_units max_long_blocks".split()]
        + [(n, ctypes.c_int32) for n in "block block_stride dtype".split()]
        + [("scale", ctypes.c_float), ("reserved", ctypes.c_int32)]
    )


GROUP = np.dtype([("start", "<i4"), ("count", "u1"), ("flags", "u1"), ("hidden", "u1"), ("reserved", "u1")])
FIELDS = "first_key last_key long_block landmark part_first part_last".split()
UNIT = np.dtype([("groups", GROUP, 8)] + [(name, "<i4") for name in FIELDS])
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def build():
    """One nvcc a file, all at once, then one shared library."""
    os.makedirs(BUILT, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    running = []
    for source in sorted(glob.glob(os.path.join(SOURCES, "*.cu"))):
        name = os.path.basename(source)[:-3]
        arch = "90a" if name == "hopper" else f"{major}{minor}"
        flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-Xptxas", "-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        log = open(os.path.join(BUILT, name + ".log"), "w")
        running.append(subprocess.Popen(["nvcc", *flags, "-c", source, "-o", os.path.join(BUILT, name + ".o")], stdout=log, stderr=log))
    if any([process.wait() for process in running]):
        sys.exit(f"nvcc failed: see {BUILT}/*.log")
    objects = glob.glob(os.path.join(BUILT, "*.o"))
    subprocess.run(["nvcc", "-shared", *objects, "-o", os.path.join(BUILT, "liblandmark.so")], check=True)


def load():
    lib = ctypes.CDLL(os.path.join(BUILT, "liblandmark.so"))
    lib.landmark_attention_error.restype = ctypes.c_char_p
    return lib


def units_of(landmarks, kv_len, mode):
    """The units of one row, and how many long blocks it has."""
    units, groups, long_blocks = [], [], 0
    hidden = set(landmarks) if mode == "nomem" else set()

    def flush(**of_block):
        nonlocal groups
        if groups:
            first, last = groups[0][0], groups[-1][0] + groups[-1][1] - 1
            place = dict(long_block=-1, landmark=-1, part_first=-1, part_last=-1) | of_block
            units.append((groups, first, last, *(place[name] for name in FIELDS[2:])))
        groups = []

    def put(start, n, flags):
        for i in range(0, n, 8):
            count = min(8, n - i)
            bits = sum(1 << x for x in range(count) if start + i + x in hidden)
            groups.append((start + i, count, flags if i + count == n else 0, bits, 0))

    def plain(start, end, **of_block):
        flush()
        for i in range(start, end, 64):
            closes = 2 if of_block and i + 64 >= end else 0
            put(i, min(64, end - i), 1 | closes)
            flush(**of_block)

    if mode == "ignoremem":
        start = 0
        for end in [*landmarks, kv_len]:
            for i in range(start, end, 8):
                if len(groups) == 8:
                    flush()
                put(i, min(8, end - i), 0)
            start = end + 1
        flush()
        for unit in units:
            unit[0][-1] = (*unit[0][-1][:2], 1, 0, 0)
    elif mode == "nomem":
        plain(0, kv_len)
    else:
        start = 0
        for landmark in landmarks:
            n = landmark + 1 - start
            if n <= 64:
                if len(groups) + -(-n // 8) > 8:
                    flush()
                put(start, n, 1 | 2)
            else:
                flush()
                first = len(units)
                last = first + -(-n // 64) - 1
                plain(start, landmark + 1, long_block=long_blocks, landmark=landmark, part_first=first, part_last=last)
                long_blocks += 1
            start = landmark + 1
        if kv_len - start <= 64:
            if len(groups) + -(-(kv_len - start) // 8) > 8:
                flush()
            put(start, kv_len - start, 1)
        else:
            plain(start, kv_len)
        flush()
    table = np.zeros(len(units), UNIT)
    for entry, unit in zip(table, units):
        for i, group in enumerate(unit[0]):
            entry["groups"][i] = group
        for name, value in zip(FIELDS, unit[1:]):
            entry[name] = value
    return table, long_blocks


def blocks_of(rows, q_len, kv_len, mode):
    """Blocks, views and stride for Hopper's kernels, or None."""
    if mode != "grouped":
        return None
    lists = []
    for landmarks in rows:
        blocks, start = [], 0
        for landmark in landmarks:
            if landmark + 1 - start > 64:
                return None
            blocks.append((start, landmark + 1 - start))
            start = landmark + 1
        lists.append(blocks + [(start, BEYOND) for start in range(start, kv_len, 64)])
    stride = max(map(len, lists))
    stride += stride % 2
    if kv_len < 0.4 * 64 * stride:
        return None
    history, views = kv_len - q_len, []
    for blocks in lists:
        starts, ends = np.array([s for s, _ in blocks]), np.array([s + n for s, n in blocks])
        for first in range(0, q_len, 64):
            last = history + min(first + 64, q_len) - 1
            views.append((int((starts <= last).sum()), int((ends <= history + first).sum())))
    filled = [blocks + [(kv_len, BEYOND)] * (stride - len(blocks)) for blocks in lists]
    return torch.tensor(filled, dtype=torch.int32, device=DEV), torch.tensor(views, dtype=torch.int32, device=DEV), stride


class Op:
    """A call, its workspaces poisoned."""

    def __init__(self, lib, q, k, v, rows, mode="grouped", block=0):
        batch, heads, q_len, head_dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        tables = [units_of(row, kv_len, mode) for row in rows]
        self.lib = lib
        self.units = torch.from_numpy(np.concatenate([t for t, _ in tables]).view(np.uint8)).to(DEV)
        self.first = torch.from_numpy(np.cumsum([0] + [len(t) for t, _ in tables]).astype(np.int32)).to(DEV)
        long_blocks, q_pad = max(n for _, n in tables), -(-q_len // 128) * 128
        poison = lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype, device=DEV)
        self.inputs = q, k, v
        self.out, self.dq = poison(q.shape, q.dtype), poison(q.shape, q.dtype)
        self.dk, self.dv = poison(k.shape, q.dtype), poison(k.shape, q.dtype)
        if mode == "ignoremem":  # nobody writes the landmarks' gradients
            self.dk.zero_(), self.dv.zero_()
        self.lse, self.rows = poison(q.shape[:3], torch.float32), poison((batch, heads, q_pad, 2), torch.float32)
        self.stats = poison((batch, heads, 16 if long_blocks else 1, q_pad, 2), torch.float32)
        self.listed = blocks_of(rows, q_len, kv_len, mode)
        p = self.params = Params()
        for name in "out lse dq dk dv rows stats units".split():
            setattr(p, name, getattr(self, name).data_ptr())
        for name, x in zip("qkv", self.inputs):
            setattr(p, name, x.data_ptr())
            setattr(p, name + "_strides", Strides(*x.stride()[:3]))
        p.first_unit = self.first.data_ptr()
        if self.listed:
            p.blocks, p.views, p.block_stride = self.listed[0].data_ptr(), self.listed[1].data_ptr(), self.listed[2]
        p.batch, p.heads, p.kv_heads, p.q_len, p.kv_len, p.head_dim = batch, heads, kv_heads, q_len, kv_len, head_dim
        p.q_pad, p.max_units, p.max_long_blocks = q_pad, max(len(t) for t, _ in tables), long_blocks
        p.block, p.dtype, p.scale = block, TYPES[q.dtype], head_dim**-0.5

    def run(self, function):
        error = function(ctypes.byref(self.params), VP(torch.cuda.current_stream().cuda_stream))
        if error:
            raise RuntimeError(self.lib.landmark_attention_error(error).decode())

    def forward(self):
        self.run(self.lib.landmark_attention_forward)

    def backward(self, dout):
        self.dout = dout
        self.params.dout, self.params.dout_strides = dout.data_ptr(), Strides(*dout.stride()[:3])
        self.run(self.lib.landmark_attention_backward)

    def results(self):
        return self.out, self.dq, self.dk, self.dv


def reference(q, k, v, rows, mode):
    """In float64: output and log-sum-exp."""
    kv_len, none = k.shape[2], float("-inf")
    position, key = torch.arange(kv_len - q.shape[2], kv_len, device=DEV), torch.arange(kv_len, device=DEV)
    softmax = lambda x: torch.softmax(x, -1).nan_to_num(0.0)
    outs, lses = [], []
    for b, landmarks in enumerate(rows):
        kb, vb = (x[b].repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        s = q[b] @ kb.transpose(1, 2) * q.shape[3] ** -0.5
        is_landmark = torch.zeros(kv_len, dtype=torch.bool, device=DEV)
        is_landmark[torch.tensor(landmarks, dtype=torch.long, device=DEV)] = True
        causal = key[None] <= position[:, None]
        if mode == "nomem":
            seen = causal & ~((key[None] == position[:, None]) & is_landmark[None])
        else:
            seen = causal & ~is_landmark[None]
        block = torch.cumsum(is_landmark.long(), 0) - is_landmark.long()
        if mode == "grouped":
            seen &= block[None] == block[position][:, None]
            earlier = is_landmark[None] & (block[None] < block[position][:, None])
            outer = s.masked_fill(~(seen | earlier), none)
        else:
            outer = s.masked_fill(~seen, none)
        weights = softmax(outer)
        out = weights.masked_fill(~seen, 0.0) @ vb
        if mode == "grouped":
            for c, landmark in enumerate(landmarks):
                inside = (block == c) & ~is_landmark
                if inside.any():
                    share = (weights[..., landmark] * earlier[:, landmark]).unsqueeze(-1)
                    out = out + share * (torch.softmax(s[..., inside], -1) @ vb[:, inside])
        outs.append(out)
        lses.append(torch.logsumexp(outer, -1))
    return torch.stack(outs), torch.stack(lses)


def error(got, expected):
    if not torch.isfinite(got).all():
        return float("inf")
    # Differences of equal numbers (gradients of a softmax of one) have a size of rounding errors.
    size = max(expected.norm().item(), 0.1 * expected.numel() ** 0.5)
    return (got.double() - expected).norm().item() / size


def random_case(rng):
    kv_heads, batch, kv_len = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([1, 7, 64, 65, 100, 128, 130, 200, 256, 300, 333, 600])
    kind, block = rng.random(), 0
    if kind < 0.6:
        block = rng.choice([2, 3, 8, 16, 49, 50, 51, 51, 57, 63, 64, 64, 65, 100, 128, 500, 4096])
        rows = [list(range(block - 1, kv_len, block))] * batch
    elif kind < 0.9:
        least, most = rng.choice([(1, 4), (1, 64), (20, 64), (40, 64), (1, 200)]), kv_len
        rows = []
        for _ in range(batch):
            row, at = [], -1
            while (at := at + rng.randint(*least)) < most:
                row.append(at)
            rows.append(row)
    else:
        rows = [[] for _ in range(batch)]
    mode = rng.choice(["grouped"] * 6 + ["nomem", "ignoremem"])
    return dict(
        batch=batch, heads=kv_heads * rng.choice([1, 1, 2, 3]), kv_heads=kv_heads, kv_len=kv_len,
        q_len=rng.choice([kv_len, kv_len, kv_len, 1, max(1, kv_len // 2), max(1, kv_len - 1)]),
        head_dim=rng.choice([8, 32, 33, 40, 64, 64, 64, 80, 96, 128, 128, 128, 160, 256]),
        rows=rows, mode=mode, block=block if mode == "grouped" else 0, strided=rng.random() < 0.3,
    )  # fmt: skip


def check(lib, cases, only_random):
    """Random calls, and before them every size of block that has a way of its own. Returns whether all are near the reference."""
    rng, worst, bad = random.Random(0), {}, 0
    wanted = []
    for block in [] if only_random else [2, 16, 48, 49, 50, 51, 56, 57, 63, 64, 65, 100, 128, 500, 4096]:
        kv_len = 4600 if block == 4096 else 777 if block == 500 else 400
        for head_dim, q_len in ((128, kv_len), (64, kv_len - 70)):
            rows = [list(range(block - 1, kv_len, block))]
            wanted.append(dict(batch=1, heads=2, kv_heads=1, kv_len=kv_len, q_len=q_len, head_dim=head_dim, rows=rows, mode="grouped", block=block, strided=False))
    # Landmarks side by side, among blocks that Hopper's kernels take from a list.
    side_by_side = [49, 50, 100, 101, 102, 160, 200, 201, 260, 300]
    for head_dim in () if only_random else (128, 64):
        wanted.append(dict(batch=1, heads=2, kv_heads=1, kv_len=420, q_len=420, head_dim=head_dim, rows=[side_by_side], mode="grouped", block=0, strided=False))
    for case in wanted + [random_case(rng) for _ in range(cases)]:
        for dtype in TYPES:
            def tensor(heads, steps):
                shape = case["batch"], heads, steps, case["head_dim"]
                if not case["strided"]:
                    return torch.randn(shape, device=DEV).to(dtype)
                return torch.randn(shape[0], steps, heads, shape[3], device=DEV).to(dtype).transpose(1, 2)

            q, dout = (tensor(case["heads"], case["q_len"]) for _ in range(2))
            k, v = (tensor(case["kv_heads"], case["kv_len"]) for _ in range(2))
            op = Op(lib, q, k, v, case["rows"], case["mode"], case["block"])
            op.forward(), op.backward(dout)
            exact = [x.double().contiguous().requires_grad_() for x in (q, k, v)]
            out, lse = reference(*exact, case["rows"], case["mode"])
            expected = [out.detach(), *torch.autograd.grad((out * dout.double()).sum(), exact)]
            errors = [error(*pair) for pair in zip(op.results(), expected)]
            finite = torch.isfinite(lse)
            errors.append((op.lse - lse)[finite].abs().max().item() if finite.any() else 0.0)
            worst[dtype] = [max(pair) for pair in zip(errors, worst.get(dtype, errors))]
            if max(errors) > TOLERANCE[dtype] or not torch.equal(torch.isneginf(op.lse), torch.isneginf(lse)):
                bad += 1
                print("BAD", dtype, {**case, "rows": [len(row) for row in case["rows"]]}, ["%.1e" % e for e in errors])
    for dtype, errors in worst.items():
        print(dtype, "worst of out dq dk dv lse:", *("%.1e" % e for e in errors))
    print(f"{len(wanted) + cases} calls in three types, {bad} bad")
    return bad == 0


def golden(lib, folder):
    from safetensors.torch import load_file

    good = True
    for path in sorted(glob.glob(os.path.join(folder, "op_*.safetensors"))):
        case = load_file(path)
        rows = [torch.nonzero(row).flatten().tolist() for row in case["is_landmark"]]
        for dtype in TYPES:
            q, k, v, dout = (case[name].to(DEV, dtype) for name in ("q", "k", "v", "dout"))
            op = Op(lib, q, k, v, rows)
            op.forward(), op.backward(dout)
            errors = [error(got.cpu(), case[name].double()) for got, name in zip(op.results(), ("out", "dq", "dk", "dv"))]
            good &= max(errors) <= TOLERANCE[dtype]
            print(f"{os.path.basename(path):36} {str(dtype)[6:]:9}", *("%.1e" % e for e in errors))
    return good


def same(lib):
    good = True
    for kv_heads, steps, head_dim, block, dtype in [(2, 1000, 128, 51, torch.bfloat16), (4, 1024, 64, 64, torch.bfloat16), (2, 700, 64, 500, torch.float16), (1, 500, 128, 51, torch.float32), (4, 2048, 128, 16, torch.bfloat16)]:
        q, dout = (torch.randn(2, 4, steps, head_dim, device=DEV).to(dtype) for _ in range(2))
        k, v = (torch.randn(2, kv_heads, steps, head_dim, device=DEV).to(dtype) for _ in range(2))
        runs = []
        for _ in range(10):
            op = Op(lib, q, k, v, [list(range(block - 1, steps, block))] * 2, block=block)
            op.forward(), op.backward(dout)
            runs.append(op.results())
        equal = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
        good &= equal
        print("the same bits" if equal else "DIFFERENT BITS", "in 10 runs: block", block, dtype)
    return good


def milliseconds(call, repeats=15):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(), call(), end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def peers(authors, olmo):
    """The classes of other landmark kernels: `apply(q, k, v, 0, scale, block)`."""
    found = {}
    if authors:
        sys.path.insert(0, authors)
        found["authors' Triton"] = importlib.import_module("flash_landmark_attention").FusedLandmarkAttention
    if olmo:
        # The kernels without the model around them, which needs the whole package.
        folder = tempfile.mkdtemp()
        text = open(os.path.join(olmo, "landmark_fast.py")).read().split("class FastLandmarkAttention")[0]
        begin, end = text.index("from olmo_core"), text.index("try:\n    import triton")
        names = "FusedLandmarkAttention, _bwd_preprocess, _fwd_kernel"
        open(os.path.join(folder, "olmo_fast.py"), "w").write(f"{text[:begin]}from landmark_kernel import {names}\n{text[end:]}")
        open(os.path.join(folder, "landmark_kernel.py"), "w").write(open(os.path.join(olmo, "landmark_kernel.py")).read())
        sys.path.insert(0, folder)
        found["OLMo-core"] = importlib.import_module("olmo_fast")._FusedLandmarkAttentionFast
    return found


def bench(lib, authors, olmo):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    print(torch.cuda.get_device_name(), "bf16, causal; milliseconds (TFLOP/s of dense causal attention)")
    others = peers(authors, olmo)
    for batch, heads, steps, head_dim in [(16, 8, 512, 128), (4, 32, 2048, 128), (1, 32, 8192, 128), (1, 32, 16384, 128), (4, 32, 2048, 64)]:
        q, k, v, dout = (torch.randn(batch, heads, steps, head_dim, device=DEV, dtype=torch.bfloat16) for _ in range(4))
        flops = 2 * batch * heads * steps * steps * head_dim
        rng, irregular, at = random.Random(0), [], -1
        while (at := at + rng.randint(38, 64)) < steps:
            irregular.append(at)

        def show(name, forward, backward):
            f, b = milliseconds(forward), milliseconds(backward)
            rates = flops / f / 1e9, 2.5 * flops / b / 1e9
            print(f"{batch},{heads},{steps},{head_dim:<4} {name:22} forward {f:7.3f} ({rates[0]:4.0f})  backward {b:8.3f} ({rates[1]:4.0f})  both {f + b:8.3f}", flush=True)

        for name, row, block in [("ours, 64", range(63, steps, 64), 64), ("ours, 51", range(50, steps, 51), 51), ("ours, irregular 38-64", irregular, 0), ("ours, none", [], 0)]:
            op = Op(lib, q, k, v, [list(row)] * batch, block=block)
            show(name, op.forward, lambda: op.backward(dout))
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        gradients = lambda out: lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
        for name, backend in [("dense, cuDNN", SDPBackend.CUDNN_ATTENTION), ("dense, flash", SDPBackend.FLASH_ATTENTION)]:
            with sdpa_kernel(backend):
                show(name, lambda: sdpa(q, k, v, is_causal=True), gradients(sdpa(*inputs, is_causal=True)))
        for name, peer in others.items():
            arguments = 0, head_dim**-0.5, 64
            show(name + ", 64", lambda: peer.apply(q, k, v, *arguments), gradients(peer.apply(*inputs, *arguments)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the kernels first")
    parser.add_argument("--check", type=int, metavar="N", help="N random calls against float64")
    parser.add_argument("--only_random", action="store_true", help="leave out the calls with every size of block")
    parser.add_argument("--golden", metavar="DIR", help="the authors' numbers")
    parser.add_argument("--same", action="store_true", help="whether repeated runs give the same bits")
    parser.add_argument("--bench", action="store_true", help="times")
    parser.add_argument("--authors", metavar="DIR")
    parser.add_argument("--olmo", metavar="DIR")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.build:
        build()
    lib, good = load(), True
    assert lib.landmark_attention_params_size() == ctypes.sizeof(Params)
    if args.golden:
        good &= golden(lib, args.golden)
    if args.check is not None:
        good &= check(lib, args.check, args.only_random)
    if args.same:
        good &= same(lib)
    if args.bench:
        bench(lib, args.authors, args.olmo)
    sys.exit(not good)


if __name__ == "__main__":
    main()
