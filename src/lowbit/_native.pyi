from torch import Tensor

def isa() -> str: ...
def supported_isas() -> list[str]: ...
def block_range(weight: Tensor, block_rows: int, block_cols: int, least: Tensor, greatest: Tensor, /) -> int: ...
def quantize_affine(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    code_max: float,
    round_sum: bool,
    block_rows: int,
    block_cols: int,
    out: Tensor,
    /,
) -> None: ...
def quantize_levels(
    weight: Tensor, scale: Tensor, levels: Tensor, codes: Tensor, block_rows: int, block_cols: int, out: Tensor, /
) -> None: ...
def quantize_fp8(
    weight: Tensor, scale: Tensor, e5m2: bool, block_rows: int, block_cols: int, out: Tensor, /
) -> None: ...
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    minus: bool,
    block_rows: int,
    block_cols: int,
    out: Tensor,
    /,
) -> None: ...
def error(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    minus: bool,
    block_rows: int,
    block_cols: int,
    /,
) -> tuple[float, float, float]: ...
def sweep(
    target: Tensor,
    weight: Tensor,
    error: Tensor,
    coupling: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    code_max: float,
    round_sum: bool,
    keep_zeros: bool,
    sorted_levels: Tensor | None,
    sorted_codes: Tensor | None,
    levels: Tensor | None,
    codes: Tensor,
    /,
) -> None: ...
def block_errors(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    code_max: float,
    round_sum: bool,
    keep_zeros: bool,
    sorted_levels: Tensor | None,
    sorted_codes: Tensor | None,
    levels: Tensor | None,
    importance: Tensor | None,
    block_rows: int,
    block_cols: int,
    out: Tensor,
    /,
) -> None: ...
def pack_bits(codes: Tensor, bits: int, words: Tensor, /) -> None: ...
def unpack_bits(words: Tensor, bits: int, codes: Tensor, /) -> None: ...
def pack_bits_transposed(codes: Tensor, bits: int, words: Tensor, /) -> None: ...
def unpack_bits_transposed(words: Tensor, bits: int, codes: Tensor, /) -> None: ...
def file_holds(file: int, parts: list[Tensor], starts: list[int], /) -> bool: ...
def transpose_words(words: Tensor, out: Tensor, /) -> None: ...
def pack_awq(codes: Tensor, words: Tensor, /) -> None: ...
def unpack_awq(words: Tensor, codes: Tensor, /) -> None: ...
def lines_to_awq(lines: Tensor, words: Tensor, /) -> None: ...
def awq_to_lines(words: Tensor, lines: Tensor, /) -> None: ...
def awq_to_rows(words: Tensor, rows: Tensor, /) -> None: ...
def pack_nibbles_high_first(codes: Tensor, packed: Tensor, /) -> None: ...
def unpack_nibbles_high_first(packed: Tensor, codes: Tensor, /) -> None: ...
def ggml_runs(type: int, /) -> list[int]: ...
def sweep_runs(
    type: int,
    target: Tensor,
    weight: Tensor,
    error: Tensor,
    coupling: Tensor,
    scale: Tensor,
    solve: Tensor,
    metric: Tensor,
    level: Tensor,
    first: bool,
    codes: Tensor,
    /,
) -> None: ...
def ggml_shape(type: int, /) -> tuple[int, int, int, bool, int]: ...
def ggml_pack(
    type: int,
    codes: Tensor,
    scale: Tensor,
    min: Tensor | None,
    scale_codes: Tensor | None,
    min_codes: Tensor | None,
    blocks: int,
    stored: Tensor,
    /,
) -> int: ...
def ggml_unpack(
    type: int,
    stored: Tensor,
    blocks: int,
    codes: Tensor | None,
    scale: Tensor,
    min: Tensor | None,
    scale_codes: Tensor | None,
    min_codes: Tensor | None,
    /,
) -> None: ...
def ggml_words(type: int, stored: Tensor, blocks: int, bits: int, words: Tensor, /) -> None: ...
def ggml_pack_words(
    type: int,
    words: Tensor,
    bits: int,
    scale: Tensor,
    min: Tensor | None,
    scale_codes: Tensor | None,
    min_codes: Tensor | None,
    blocks: int,
    stored: Tensor,
    /,
) -> None: ...
def ggml_panel_bits(type: int, /) -> int: ...
def ggml_panels(
    type: int,
    stored: Tensor,
    blocks: int,
    order: Tensor | None,
    threads: int,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    fine: Tensor | None,
    fine_zero: Tensor | None,
    /,
) -> tuple[bool, bool]: ...
def ggml_encode(
    type: int,
    weight: Tensor,
    importance: Tensor | None,
    fitted: bool,
    codes: Tensor,
    scale: Tensor,
    min: Tensor | None,
    scale_codes: Tensor | None,
    min_codes: Tensor | None,
    /,
) -> bool: ...
def causal_softmax(scores: Tensor, period: int, first: int, scale: float, out: Tensor, /) -> None: ...
def causal_softmax_slopes(shares: Tensor, period: int, first: int, scale: float, slopes: Tensor, /) -> None: ...

class Table:
    def __init__(
        self, values: Tensor, cols: int, type: int, levels: Tensor | None, scales: Tensor | None, step: int, /
    ) -> None: ...
    def rows(self, ids: list[int], out: Tensor, /) -> bool: ...

class Matrix:
    def __init__(
        self,
        way: int,
        bits: int,
        step: int,
        over: int,
        sub: int,
        rows: int,
        cols: int,
        codes: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        fine: Tensor | None,
        fine_zero: Tensor | None,
        joined: bool,
        minus: bool,
        offset: float,
        level: Tensor | None,
        table: Tensor | None,
        unit: float,
        dtype: int,
        inputs: int,
        order: Tensor | None,
        bias: Tensor | None,
        kept: object,
        /,
    ) -> None: ...
    def multiply(self, inputs: Tensor, threads: int, out: Tensor, /) -> None: ...

class Cache:
    bytes: int
    def reserve(self, positions: int, /) -> None: ...

class Decoder:
    def __init__(
        self,
        hidden: int,
        heads: int,
        key_heads: int,
        head_size: int,
        inner: int,
        turned: int,
        epsilon: float,
        scale: float,
        cap: float,
        gelu: bool,
        embedding: Table,
        factor: float,
        norm: Tensor,
        head: Matrix,
        steps: Tensor,
        factors: Tensor,
        threads: int,
        /,
    ) -> None: ...
    def add(self, matrices: list[Matrix], norms: list[Tensor | None], window: int, angles: int, /) -> None: ...
    def cache(self, keep: int, /) -> Cache: ...
    def read(self, ids: list[int], caches: list[Cache], positions: list[int], tokens: list[int], /) -> bool: ...
    def logits(self, out: Tensor, /) -> None: ...
    def likeliest(self) -> list[int]: ...

def interleave(codes: Tensor, order: Tensor | None, bits: int, full: int, threads: int, out: Tensor, /) -> None: ...
def interleave_floats(values: Tensor, full: int, threads: int, out: Tensor, /) -> None: ...
def widen_panels(panels: Tensor, count: int, cols: int, threads: int, words: Tensor, scale: Tensor, /) -> bool: ...
