"""NorMuon is the same optimizer on every layout: replicas, FSDP2 shards (even, uneven, empty, one
row) and HSDP, on 2, 3 and 4 processes, against the plain twin; and the twin whose norms are local
to the shards, which other implementations accept, fails the same comparison."""

import json

import pytest
import torch
import worker
from safetensors.torch import load_file
from support import agree, relative
from twin import Twin

from nanonormuon import engine
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.runtime.distributed import World

WORLDS = [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]


@pytest.fixture(scope="module")
def saved_by_fsdp(tiny, forks, tmp_path_factory):
    """A checkpoint of a short run under FSDP2, of three ranks, so that its shards are uneven."""
    out = tmp_path_factory.mktemp("fsdp") / "run"
    settings = ["train.steps=2", "train.sample_tokens=0", "train.parallel=fsdp"]
    codes, said = forks.run([*tiny, *settings, "--out", out], ranks=3)
    assert codes == [0, 0, 0], said
    return max(out.glob("checkpoints/step-*"))


@pytest.fixture(scope="module", params=WORLDS)
def answers(request, saved_by_fsdp, forks, tmp_path_factory):
    """World size, tensors and facts, from one set of processes per world size."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    codes, said = forks.run([folder, saved_by_fsdp], request.param, program="worker.py")
    assert codes == [0] * request.param, said
    facts = json.loads((folder / "facts.json").read_text())
    return request.param, load_file(folder / "tensors.safetensors"), facts


def twin(name, shards=0, ns_dtype=None, axis="rows", adjust="original"):
    """What the plain twin makes of one parameter of the workers' problem."""
    weights, grads = worker.problem()
    W = weights[name]
    stack = W if W.ndim == 3 else W[None]
    results = []
    for i, matrix in enumerate(stack):
        one = Twin(matrix, 0.05, axis=axis, adjust=adjust, shards=shards, ns_dtype=ns_dtype)
        for step in grads:
            G = step[name]
            one.step(G[i] if G.ndim == 3 else G)
        results.append(one.W)
    return torch.stack(results) if W.ndim == 3 else results[0]


@pytest.fixture(scope="module")
def wanted():
    return {
        f"{axis}-{adjust}.{name}": twin(name, axis=axis, adjust=adjust)
        for axis in ("rows", "longest")
        for adjust in ("original", "match_rms_adamw")
        for name in worker.SHAPES
    }


def test_weights_equal_the_plain_twin(answers, wanted):
    world, tensors, _ = answers
    compared = 0
    for key, found in tensors.items():
        dtype, kind, rest = key.split(".", 2)
        if dtype == "fp32":
            agree(found, wanted[rest], 1e-5, f"{world} ranks, {kind}, {rest}")
            compared += 1
    assert compared == len(wanted) * (4 if world == 4 else 3)


def test_bfloat16_iterations_stay_close(answers):
    world, tensors, _ = answers
    for name in worker.SHAPES:
        reference = twin(name, ns_dtype=torch.bfloat16)
        for kind in worker.kinds(world):
            found = tensors[f"bf16.{kind}.rows-original.{name}"]
            agree(found, reference, 2e-2, f"{world} ranks, {kind}, {name}")


def test_norms_local_to_a_shard_would_be_caught(answers, wanted):
    """The negative control: at least 40 times the tolerance away, wherever shards have rows to
    differ."""
    world = answers[0]
    for name in ("square0", "uneven", "wide", "tall0"):
        error = relative(twin(name, shards=world), wanted[f"rows-original.{name}"])
        assert error > 40 * 1e-5, f"{world} ranks, {name}: {error}"


def test_the_number_of_collectives_does_not_grow_with_the_layers(answers):
    for kind, (few, many) in answers[2]["collectives"].items():
        assert few == many, kind
        gathers = ["all_gather"]
        exchange = ["all_reduce", "all_to_all_single", "all_to_all_single"]
        assert few == (gathers if kind in ("ddp", "replicas") else exchange)


def test_a_bucket_is_sent_before_the_buckets_ahead_of_it_compute(answers):
    """Of three buckets, the second's matrices travel while the first iterates; the third's before
    the first is done."""
    send, back, norms = "all_to_all_single", "all_to_all_single", "all_reduce"
    for kind, found in answers[2]["order"].items():
        if kind in ("ddp", "replicas"):
            assert found == ["all_gather"] * 3
        else:
            assert found == [send, send, back, send, norms, back, norms, back, norms]


def test_missing_gradients_count_as_zero(answers):
    _, tensors, _ = answers
    torch.manual_seed(5)
    W = torch.randn(3, 8, 6)
    twins = [Twin(w, 0.1) for w in W]
    for _ in range(2):
        for one in twins[:2]:
            one.step(torch.randn(8, 6))
        twins[2].step(torch.zeros(8, 6))
    for kind in {key.split(".")[1] for key in tensors if key.startswith("missing")}:
        agree(tensors[f"missing.{kind}.0"], twins[0].W, 1e-5, kind)
        agree(tensors[f"missing.{kind}.2"], twins[2].W, 1e-5, kind)
        assert tensors[f"missing.{kind}.1"].isfinite().all()


def test_unsupported_placements_are_refused_by_name(answers):
    assert "Shard(dim=1)" in answers[2]["refusals"]["columns"]
    assert "expected replicas, or row-wise shards" in answers[2]["refusals"]["columns"]


def test_state_lies_like_its_parameter_and_survives_a_state_dict(answers):
    assert answers[2]["state"] is True


def test_what_fsdp_saved_is_read_back_identical_on_every_layout(answers, saved_by_fsdp):
    """Saved by FSDP2 on three ranks; read by one process here, by DDP and FSDP2 on 2, 3 and 4, and
    by two nodes of 2."""
    assert answers[2]["checkpoint"] == dict.fromkeys(worker.kinds(answers[0]), True)
    assert worker.read_back(saved_by_fsdp, GPT(worker.shape_of(saved_by_fsdp)))


def test_the_readmes_loop_serves_ddp_and_fsdp_as_it_serves_one_process(answers):
    model = worker.foreign_model()
    worker.readme_loop(model, 0, 1)
    for name, p in model.named_parameters():
        for kind in worker.kinds(answers[0]):
            found = answers[1][f"readme.{kind}.{name}"]
            assert relative(found, p.detach()) < 1e-4, f"{answers[0]} ranks, {kind}, {name}"


@pytest.mark.parametrize("recipe", worker.RECIPES)
def test_a_recipe_is_the_same_on_ranks_as_on_one_process(answers, recipe):
    """Model, optimizers and schedule. With the embedding at rest in bfloat16 gradients too are
    added up in it, so that AdamW's first signs differ in places."""
    world, tensors, _ = answers
    for name, alone in worker.recipe_steps("", recipe, 0, 1).items():
        for kind in worker.kinds(world):
            found = tensors[name.replace("..", f".{kind}.")]
            assert found.dtype == alone.dtype
            limit = 3e-2 if recipe == "track3-bf16" else 1e-5
            assert relative(found.float(), alone.float()) < limit, f"{world} ranks, {kind}, {name}"


def test_experts_are_the_same_on_ranks_as_on_one_process(answers):
    """Their load to the last token, and so their biases to the last bit."""
    world, tensors, _ = answers
    alone = worker.with_experts("", 0, 1)
    assert alone["experts..visits1"].sum() == 24 * 16 * 2
    assert alone["experts..layers.1.mlp.gate.e_score_correction_bias"].any()
    for name, value in alone.items():
        for kind in worker.kinds(world):
            found = tensors[name.replace("..", f".{kind}.", 1)]
            exact = "visits" in name or "bias" in name
            limit = 0 if exact else 1e-4
            assert relative(found, value) <= limit, f"{world} ranks, {kind}, {name}"


def test_stacks_of_experts_are_sharded_whole_and_send_nothing(answers):
    for kind, found in answers[2]["stacks"].items():
        assert found == (["all_gather"] * 2 if kind in ("ddp", "replicas") else []), kind


def test_clipped_heads_are_the_same_on_ranks_as_on_one_process(answers):
    world, tensors, _ = answers
    alone = worker.clipped("", 0, 1)
    assert float(alone["clipped..peaks1"].max()) > 0.5  # the threshold
    for name, value in alone.items():
        for kind in worker.kinds(world):
            found = tensors[name.replace("..", f".{kind}.", 1)]
            assert relative(found, value) < 1e-4, f"{world} ranks, {kind}, {name}"


def test_a_trial_of_the_compiler_leaves_no_gradient_behind(answers):
    for kind, (without, after) in answers[2]["norms"].items():
        assert after == without, kind


@pytest.mark.slow
def test_compiled_gradients_are_the_eager_ones_though_one_rank_cannot_compile(forks, tmp_path):
    codes, said = forks.run([tmp_path, "compiled"], 2, program="worker.py")
    assert codes == [0, 0], said
    for rank, words in enumerate(("on another rank", "no C++ compiler here")):
        for kind, found in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            norms = {label: norm for label, (norm, _) in found.items()}
            assert norms["on"] == pytest.approx(norms["off"], rel=1e-4), kind
            assert norms["fails"] == norms["off"], kind
            assert found["on"][1] == "" and words in found["fails"][1], kind


@pytest.mark.slow
def test_a_compiled_run_under_fsdp_has_the_eager_gradients_also_after_a_resume(
    tiny, forks, tmp_path
):
    """With micro-batches to add up, and the real compiler, which compiles anew after a resume."""
    norms = {}
    for wish in ("off", "on"):
        out = tmp_path / wish
        common = [*tiny, "model.n_layer=1", "train.parallel=fsdp", f"train.compile={wish}"]
        common += ["train.sample_tokens=0", "train.micro_batch=3", "train.eval_every=0"]
        common += ["data.val_tokens=192"]  # of a single shape, for which it compiles
        for more in (["train.stop_at=3"], ["train.stop_at=6", "--resume"]):
            codes, said = forks.run([*common, *more, "--out", out], ranks=2)
            assert codes == [0, 0], said
            assert ("compiled in" in said[0]) == (wish == "on")
        rows = (out / "metrics.jsonl").read_text().splitlines()
        norms[wish] = [json.loads(row)["grad_norm"] for row in rows]
    assert len(norms["off"]) == 6
    assert norms["on"] == pytest.approx(norms["off"], rel=1e-3)


cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_a_group_of_one_rank_computes_what_no_group_does(device, forks, tmp_path):
    """As torchrun starts it on one GPU: real DDP, FSDP2, both of the optimizer's layouts and every
    helper that ranks use, on NCCL or gloo."""
    codes, said = forks.run([tmp_path, "alone", device], program="worker.py")
    assert codes == [0], said
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["grouped"] and facts["memory"]
    assert facts["asked"] == [device, "cpu", "cpu"]  # the helpers' reductions came about
    assert facts["total"] == facts["gather"][0] == [0, 1, 2] and facts["largest"] == [2, 3]
    assert facts["any"] == [1, 0]
    assert facts["from_first"] == {"a": [1]} and facts["first_does"] == "done"
    assert facts["ddp Engine"] == ["DistributedDataParallel", False]
    assert facts["fsdp Engine"] == ["FSDPGPT", True]
    assert all(facts["layouts"].values()) and facts["cublas"] == ":4096:8"
    limit = 0 if device == "cpu" else 1e-2
    for label, loss in facts["losses"].items():
        assert loss == pytest.approx(facts["losses"]["alone"], rel=limit), label
    for label, off in facts["off"].items():
        for name, found in off.items():
            # whole weights are bfloat16 under FSDP2; the head's gradient is in float32 otherwise
            rounded = (label, name) == ("fsdp Engine", "lm_head.weight")
            assert found <= (limit or 5e-3 * rounded), f"{label}, {name}"


def test_fsdp_shards_over_the_device_that_was_asked_for(monkeypatch):
    """Not over the machine's GPUs, which FSDP2 takes if nobody names a device."""
    from torch.distributed import fsdp

    monkeypatch.setattr(engine, "init_device_mesh", lambda kind, shape, **_: (kind, shape))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    meshes = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda *_, mesh=None, **__: meshes.append(mesh))
    model = GPT(GPTConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=16))
    for kind in ("cpu", "cuda"):
        mesh = engine.grid(World(0, 4, torch.device(kind)), "fsdp")
        engine.shard(model, mesh, None, True)
        assert engine.grid(World(0, 4, torch.device(kind)), "hsdp") == (kind, (2, 2))
    assert meshes == [("cpu", (4,))] * 3 + [("cuda", (4,))] * 3
