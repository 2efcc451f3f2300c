"""Records of runs that did not happen, for tests of the report: a small model, and the parts of one to vary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowbit.stages.report import (
    Count,
    Histogram,
    Machine,
    Memory,
    Outcome,
    Result,
    Row,
    RunRecord,
    Source,
    Verification,
)

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">|`'{{7*7}}"
MATRICES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}


def make_rows(layers: int, scheme: str = "int4-g128", bits: int = 4) -> tuple[Row, ...]:
    """Embedding, matrices and norms of a Llama; errors rise with the layer and the kind of matrix."""
    rows = [Row("model.embed_tokens.weight", (4096, 256), "bfloat16", None, None, "embedding", 2**21, 2**21)]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        rows.append(Row(f"{name}.input_layernorm.weight", (256,), "bfloat16", None, None, "not a matrix", 512, 512))
        for kind, (part, (high, wide)) in enumerate(MATRICES.items()):
            outcome = Outcome("rtn", 0.01 + 0.001 * kind + 0.00001 * layer, 0.02 + 0.001 * layer, 0.01)
            after = high * wide * bits // 8 + 2 * (high * wide // 128)
            rows.append(
                Row(
                    f"{name}.{part}.weight",
                    (high, wide),
                    "bfloat16",
                    scheme,
                    "rtn",
                    "--scheme",
                    2 * high * wide,
                    after,
                    outcome,
                )
            )
        rows.append(Row(f"{name}.self_attn.q_norm.weight", (32,), "bfloat16", None, None, "not a matrix", 64, 64))
    return tuple(rows)


def make_run(rows: tuple[Row, ...] | None = None, **changes: Any) -> RunRecord:
    """A complete, evaluated run of two layers; any field of the record can be changed."""
    rows = make_rows(2) if rows is None else rows
    worst = Histogram(
        "model.layers.1.mlp.down_proj.weight",
        (-4.0, -2.0, 0.0, 1.0, 4.0),
        (10, 30, 40, 20),
        (-3.0, 0.0, 0.0, 2.0),
        (25, 30, 20, 25),
    )
    run = RunRecord(
        command="lowbit quantize wiki out --scheme int4-g128",
        lowbit="0.1.0",
        created="2026-03-09T08:05:00+00:00",
        machine=Machine("A processor", 2, 2**34, "Linux", "3.12.1", "2.9.0"),
        source=Source("models/wiki", sum(row.before for row in rows), 4_000_000, "bfloat16"),
        result=Result("out", "compressed-tensors", sum(row.after for row in rows), 4.125, 7.0),
        rows=rows,
        seconds={"plan": 0.01, "quantize": 0.5, "verify": 0.05, "evaluate": 12.0},
        memory=Memory(400 * 2**20, 450 * 2**20, 2**30),
        verified=Verification(len(rows), 0, 0.05),
        evaluation=make_evaluation(),
        histograms=(worst,),
        counts=(Count("kept", "embedding", 1),),
    )
    return replace(run, **changes)


def make_evaluation(
    kl: tuple[float, float | None, float | None] = (0.03, 0.028, 0.032),
    change: tuple[float, float | None, float | None] = (0.02, 0.015, 0.025),
) -> dict[str, Any]:
    """What `Evaluation.to_dict()` gives, with these values and intervals."""

    def score(
        value: float, low: float | None = None, high: float | None = None, p: float | None = None
    ) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high, "p_value": p}

    conditions = {
        "text": "text.txt", "sha256": "ab" * 32, "context": 512, "stride": 512, "tokens": 9728, "windows": 19,
        "scored": 9709, "special": ["<s>"], "dtype": "float32", "blocks": 10, "confidence": 0.95, "seed": 0,
    }  # fmt: skip
    scores = {
        "perplexity": score(40.8, 38.0, 43.0), "reference_perplexity": score(40.0, 37.5, 42.5),
        "log_perplexity_change": score(*change, 0.0001), "kl_mean": score(*kl), "kl_median": score(0.01),
        "kl_p99": score(0.2), "top1_agreement": score(0.9, 0.89, 0.91),
    }  # fmt: skip
    return {"model": "out", "reference": "models/wiki", "conditions": conditions, "scores": scores}
