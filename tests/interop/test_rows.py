"""Rows of one weight in several schemes: from a policy to onnxruntime, and read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from click.testing import CliRunner
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

import lowbit
from lowbit.cli import group
from lowbit.errors import FormatError, UnsupportedError
from lowbit.inspect import inspect
from lowbit.pipeline import run_conversion
from lowbit.schemes import parse
from lowbit.stages._changes import Goal
from lowbit.stages._model import open_blueprint
from lowbit.stages.checkpoint import open_checkpoint
from tests.reference.methods import rtn
from tests.reference.models import save_tiny
from tests.unit.test_onnx import session

# Where these packages are installed, transformers and torch.onnx import them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS, SPECIAL = 96, 77  # the last is a token that the text does not have
IDS = torch.arange(3, 35).reshape(2, 16)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(path: Path, tied: bool) -> Path:
    """A tiny Llama with a tokenizer, and a text in which words are the less frequent the larger their number."""
    save_tiny("llama", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    if tied:
        tensors = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name != HEAD}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    names = {f"w{n}": n for n in range(WORDS)}
    tokenizer = Tokenizer(WordLevel({**names, "w0": 0}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, pad_token=f"w{SPECIAL}").save_pretrained(path)
    text = path.parent / "text.txt"
    text.write_text(" ".join(f"w{n}" for n in frequent() for _ in range(order()[n])))
    return text


def order() -> list[int]:
    """Times that each word is in the text: all different, in no order of their numbers."""
    found = [(n * 37) % WORDS for n in range(WORDS)]
    found[SPECIAL] = 0
    return found


def frequent() -> list[int]:
    """Words by their frequency, and then by number."""
    return sorted(range(WORDS), key=lambda n: (-order()[n], n))


def quantize(model: Path, out: Path, text: Path, policy: str, *more: str) -> dict[str, Any]:
    """The command line; the report."""
    (model.parent / "rules.toml").write_text(policy)
    line = ["quantize", str(model), str(out), "--format", "onnx", "--policy", str(model.parent / "rules.toml")]
    line += [
        "--calibration",
        str(text),
        "--samples",
        "70",
        "--sampling",
        "first",
        "--sequence-length",
        "64",
        "--scheme",
        "int4-g16",
        *more,
    ]
    done = CliRunner().invoke(group, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def rounded(rows: Tensor, scheme: str) -> Tensor:
    """Round to nearest of some rows, by the slow definition."""
    if scheme == "keep":
        return rows.float()
    found = torch.empty(rows.shape)
    for block in rtn(rows.float().numpy(), parse(scheme)):
        found[block.rows, block.cols] = torch.from_numpy(block.decoded)
    return found


def check(model: Path, out: Path, schemes: dict[str, list[str]]) -> None:
    """Logits, and looked up rows, of onnxruntime beside a float model with each row rounded in its scheme.

    `schemes`: of each row of the weights that are named; all other matrices of blocks are in int4-g16.
    """
    meant: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in meant.named_parameters():
            if weight.dim() == 2 and ("layers" in name or name in schemes):
                each = schemes.get(name, ["int4-g16"] * len(weight))
                for row, scheme in enumerate(each):
                    weight[row] = rounded(weight[row : row + 1], scheme)[0]
        wanted = meant(input_ids=IDS, use_cache=False).logits
        other = open_blueprint(open_checkpoint(out), torch.float32).resident()(input_ids=IDS, use_cache=False).logits
        loaded = lowbit.load(out, exact=True)(input_ids=IDS, use_cache=False).logits
    run = session(str(out / "model.onnx"))
    (found,) = run.run(None, {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())})
    far = [float((x - wanted).abs().max() / wanted.abs().max()) for x in (torch.from_numpy(found), other, loaded)]
    assert max(far) < 1e-5, far
    table = meant.get_input_embeddings().weight.detach()
    torch.testing.assert_close(looked_up(out), table, rtol=1e-6, atol=1e-7)


def looked_up(out: Path) -> Tensor:
    """What the graph has for each token, one by one, before the first block."""
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False)
    blocks = [i.name for i in graph.graph.initializer if i.name.startswith("model.embed_tokens.rows")]
    value = max(name for name in blocks if name.endswith(".weight"))
    kind = ""
    while kind != "Where":
        node = next(node for node in graph.graph.node if value in node.input and node.op_type != "Transpose")
        value, kind = node.output[0], node.op_type
    graph.graph.output.append(onnx.helper.make_tensor_value_info(value, 1, None))
    onnx.save(graph, str(out / "rows.onnx"))
    run = session(str(out / "rows.onnx"))
    (out / "rows.onnx").unlink()
    fed = [{"input_ids": np.array([[n, n]]), "attention_mask": np.ones((1, 2), np.int64)} for n in range(WORDS)]
    return torch.stack([torch.from_numpy(run.run(None, each)[1][0, 1]) for each in fed])


def test_an_embedding_and_a_head_by_tokens_and_attention_by_heads(tmp_path: Path) -> None:
    """Three blocks of the embedding, one of them kept; heads of queries and of the fewer keys and values."""
    model, out = tmp_path / "model", tmp_path / "out"
    text = save(model, tied=False)
    report = quantize(model, out, text, """
        [[rule]]
        role = "embedding"
        tokens = "most 12"
        scheme = "keep"
        [[rule]]
        role = ["embedding", "head"]
        tokens = "least 50%"
        scheme = "int4-g64"
        reason = "rare"
        [[rule]]
        role = "embedding"
        scheme = "int8-row-asym"
        [[rule]]
        role = "head"
        scheme = "int8-g16"
        [[rule]]
        role = "q"
        heads = [0, "2:3"]
        scheme = "int8-g16-asym"
        [[rule]]
        role = ["k", "v"]
        heads = ":1"
        blocks = 1
        scheme = "int8-row"
    """)  # fmt: skip
    most = [SPECIAL, *[n for n in frequent() if n != SPECIAL]]
    least = set(most[WORDS // 2 :])
    schemes = {
        EMBED: ["keep" if n in most[:12] else "int4-g64" if n in least else "int8-row-asym" for n in range(WORDS)],
        HEAD: ["int4-g64" if n in least else "int8-g16" for n in range(WORDS)],
    }
    for layer in (0, 1):
        eight = ["int8-g16-asym"] * 8
        schemes[f"model.layers.{layer}.self_attn.q_proj.weight"] = [*eight, *["int4-g16"] * 8] * 2
    for part in "kv":
        schemes[f"model.layers.1.self_attn.{part}_proj.weight"] = ["int8-row"] * 8 + ["int4-g16"] * 8
    check(model, out, schemes)
    rows = {row["name"]: row for row in report["rows"]}
    shown = rows["model.embed_tokens.rows1.weight"]
    assert shown["scheme"] == "int4-g64" and shown["reason"] == "policy rules.toml: rare; 48 rows"
    assert rows["model.layers.0.self_attn.q_proj.rows2.weight"]["reason"].endswith("for heads 0, 2:3; rows 16 to 23")
    check_bytes(out)
    check_back(model, out, tmp_path)


def check_bytes(out: Path) -> None:
    """What the plan says of every tensor is what the file has, and its bits are those of the layout, by hand."""
    checkpoint = open_checkpoint(out)
    # 36 rows of int8 with scales of 2 bytes and zero points of 1, 48 of a group of 64 codes of 4 bits with a scale,
    # 12 rows of float32, and the places
    sizes = {0: 12 * 32 * 4, 1: 48 * (32 + 2), 2: 36 * (32 + 2 + 1)}
    for number, size in sizes.items():
        pieces = checkpoint.pieces(f"model.embed_tokens.rows{number}.weight")
        specs = [checkpoint.specs[piece] for piece in pieces]
        assert sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs) == size
    assert checkpoint.specs["model.embed_tokens.rows"].dtype == torch.int32
    assert checkpoint.tensor("model.embed_tokens.rows").sort().values.tolist() == list(range(WORDS))


def check_back(model: Path, out: Path, folder: Path) -> None:
    """Inspected beside the original; as a float model, which is the same; refused by what holds no such blocks."""
    found = inspect(out, original=model)
    assert {each.name for each in found.compared or []} >= {"model.embed_tokens.rows1.weight"}
    assert not [finding for finding in found.findings if finding.level == "error"]
    with pytest.raises(UnsupportedError, match="--format onnx alone holds; convert it to float"):
        run_conversion(str(out), folder / "gptq", Goal("gptq"))
    with pytest.raises(UnsupportedError, match=r"would not stay as it is in bfloat16.*--lossy rounds them"):
        run_conversion(str(out), folder / "short", Goal("float", "bf16"))
    assert not (folder / "short").exists()
    assert run_conversion(str(out), folder / "float", Goal("float")).lossless
    with torch.no_grad():
        one, other = (
            open_blueprint(open_checkpoint(each), torch.float32).resident() for each in (out, folder / "float")
        )
        assert one.state_dict().keys() == other.state_dict().keys()
        for (name, value), same in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, same, rtol=0, atol=0, msg=name)


def test_a_tied_embedding_in_groups_is_looked_up_and_multiplied(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    text = save(model, tied=True)
    policy = '[[rule]]\nrole = "embedding"\ntokens = "most 30%"\nscheme = "int8-g16"\n'
    policy += '[[rule]]\nrole = "embedding"\nscheme = "int4-g16-asym"\n'
    quantize(model, out, text, policy)
    most = [SPECIAL, *[n for n in frequent() if n != SPECIAL]][:29]
    check(model, out, {EMBED: ["int8-g16" if n in most else "int4-g16-asym" for n in range(WORDS)]})
    assert [name for name in open_checkpoint(out).weights if "lm_head" in name] == []


def by_hand(path: Path, places: list[int] | None, cols: tuple[int, int] = (4, 4)) -> Path:
    """A graph of two float blocks of 2 and 3 rows, and what it says of their places."""
    values = {f"m.rows{n}.weight": np.full((2 + n, cols[n]), n, np.float32) for n in (0, 1)}
    stored = {**values, **({} if places is None else {"m.rows": np.array(places, np.int32)})}
    nodes = [onnx.helper.make_node("Gather", [name, "at"], [f"{name}.out"]) for name in stored]
    ends = [onnx.helper.make_tensor_value_info("at", 7, ["n"])]
    graph = onnx.helper.make_graph(nodes, "rows", ends, [], [numpy_helper.from_array(v, n) for n, v in stored.items()])
    file = path / "model.onnx"
    (path / "data").unlink(missing_ok=True)
    model = onnx.helper.make_model(graph)
    onnx.save(model, str(file), save_as_external_data=True, location="data", size_threshold=0)
    return file


def test_places_of_rows_that_are_not_are_refused(tmp_path: Path) -> None:
    found = open_checkpoint(by_hand(tmp_path, [2, 0, 3, 1, 4])).weights
    assert found["m.rows0.weight"].rows == ((1, 2), (3, 4))
    assert found["m.rows1.weight"].rows == ((0, 1), (2, 3), (4, 5))
    assert open_checkpoint(by_hand(tmp_path, None)).weights["m.rows1.weight"].rows == ((2, 5),)
    for wrong in ([2, 0, 3, 1, 1], [2, 0, 3, 1, 5], [2, 1, 3, 0, 4], [0, 1, 2, 3], [2, -1, 3, 1, 4]):
        with pytest.raises(FormatError, match=r"'m\.rows' has not each row of 'm\.weight' once"):
            open_checkpoint(by_hand(tmp_path, wrong))
    with pytest.raises(FormatError, match="columns of different number"):
        open_checkpoint(by_hand(tmp_path, [2, 0, 3, 1, 4], (4, 5)))


def test_gptq_of_heads_has_the_statistics_of_the_whole_layer(tmp_path: Path) -> None:
    """Heads in the scheme that they would have anyway are what they are in one piece, to the bit."""
    model = tmp_path / "model"
    text = save(model, tied=False)
    learn = ("--method", "gptq", "--inputs", "float", "--skip", "mlp")
    heads = '[[rule]]\nrole = ["q", "k", "v"]\nheads = 1\nscheme = "int4-g16"\n'
    parts = quantize(model, tmp_path / "apart", text, heads, *learn)
    quantize(model, tmp_path / "whole", text, '[[rule]]\nrole = "q"\nscheme = "int4-g16"\n', *learn)
    apart, whole = open_checkpoint(tmp_path / "apart"), open_checkpoint(tmp_path / "whole")
    chosen = {row["name"]: row["outcome"] and row["outcome"]["method"] for row in parts["rows"]}
    rows = json.loads((tmp_path / "whole" / "report.json").read_text())["rows"]
    chosen |= {row["name"]: row["outcome"] and row["outcome"]["method"] for row in rows}
    same, blocks = 0, [weight for weight in apart.weights.values() if weight.rows]
    assert len(blocks) == 2 * (3 + 2 + 2)
    for block in blocks:
        name = block.name.replace(re.findall(r"rows\d\.", block.name)[0], "")
        first, last = block.rows[0]
        # Another method is taken where it has less error on rows that were held out: of a block, or of the whole.
        if chosen[block.name] == chosen[name] == "gptq":
            one, other = apart.dequantized(block.name), whole.dequantized(name)[first:last]
            torch.testing.assert_close(one, other, rtol=0, atol=0, msg=block.name)
            same += not torch.equal(one, rounded(open_checkpoint(model).tensor(name)[first:last], "int4-g16"))
    assert same >= 5, chosen
