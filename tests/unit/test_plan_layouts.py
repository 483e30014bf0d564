"""Layouts, their communication and time, and serving: laws that hold whatever the devices are."""

from __future__ import annotations

import pytest

from glmctl.errors import GlmctlError, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.cost import kv_bytes_per_token
from glmctl.recipe.load import load
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import MuonSpec
from glmctl.run.plan.devices import KINDS, check_devices, find_device, split, this_machine
from glmctl.run.plan.layouts import Terms, layouts, options, smallest
from glmctl.run.plan.memory import Layout, Work
from glmctl.run.plan.plan import plan
from glmctl.run.plan.serving import Serving, arrangements
from glmctl.run.plan.step_time import collective_bandwidth, step_time
from glmctl.run.plan.training import job, plan_process

H100 = KINDS["h100"]


def terms(devices: int, kind: str = "h100") -> Terms:
    return Terms(KINDS[kind], devices, 2e9, 0.5, 0.05)


@pytest.mark.parametrize("devices", [64, 96, 512])
def test_layouts_use_every_device_once(devices: int) -> None:
    made = job(load("glm-4.5/pretrain"))
    for stage in made.stages:
        found = list(layouts(made, stage, terms(devices)))
        assert found
        assert len(set(found)) == len(found)
        for layout in found:
            assert layout.data * layout.shard * layout.context == devices
            assert layout.parts % layout.expert == 0
            assert made.config.n_routed_experts % layout.expert == 0
            assert stage.length % layout.context == 0
            assert layout.data_ranks <= stage.batch_tokens // stage.length


def test_options_fit_and_no_larger_micro_batch_would() -> None:
    made = job(load("glm-4.5/pretrain"))
    stage, offered = made.stages[0], terms(512)
    found = options(made, stage, offered)
    times = [option.time.total for option in found]
    assert times == sorted(times)
    for option in found:
        assert option.memory.total <= offered.room
        assert option.work.rows * option.work.micro_batches >= -(-15625 // option.layout.data_ranks)


def test_what_does_not_fit_says_by_how_much() -> None:
    made = job(load("glm-4.5/pretrain"))
    offered = terms(16)
    assert not options(made, made.stages[0], offered)
    least = smallest(made, made.stages[0], offered)
    assert least is not None
    assert least.memory.total > offered.room
    body = plan(load("glm-4.5/pretrain"), 16, H100)
    assert "days" not in body
    assert body["stages"][0]["missing_bytes"] == pytest.approx(least.memory.total - offered.room)


def test_more_memory_is_never_slower() -> None:
    made = job(load("glm-4.5-air/pretrain"))
    best = [options(made, made.stages[0], terms(128, kind))[0].time.total for kind in ("h100", "h200")]
    assert best[1] <= best[0]


def test_replicas_send_what_a_ring_sends() -> None:
    """Two times (r - 1) / r of the gradients, in fp32."""
    config = ModelConfig.model_validate(PRESETS["small"])
    found = step_time(Work(config, MuonSpec(), rows=1, length=512), Layout(data=4), H100, 1.0)
    assert found.sent["gradients"] == 2 * 3 / 4 * 4 * config.parameter_counts().total
    assert found.sent["weights"] == found.sent["experts"] == found.sent["context"] == 0


def test_tokens_travel_to_their_experts() -> None:
    """Each to k of them and back, twice; 7 of 8 leave the device."""
    config = ModelConfig.model_validate(PRESETS["small"])
    work = Work(config, MuonSpec(), rows=2, length=512, precision="bf16")
    sent = step_time(work, Layout(shard=8, expert=8), H100, 1.0).sent
    moe_layers = config.num_moe_layers + 1
    assert sent["experts"] == 4 * moe_layers * 1024 * config.num_experts_per_tok * config.hidden_size * 2 * 7 / 8


def test_a_ring_is_as_fast_as_its_narrowest_place() -> None:
    assert collective_bandwidth(H100, 8, 1) == H100.link
    assert collective_bandwidth(H100, 64, 1) == min(H100.link, 8 * H100.network)
    assert collective_bandwidth(H100, 4, 64) == H100.network


def test_arithmetic_takes_what_the_peak_allows() -> None:
    """A roofline at full efficiency is never beaten: MFU stays below 1."""
    body = plan(load("glm-4.5/pretrain"), 1024, KINDS["h200"], efficiency=1.0)
    for stage in body["stages"]:
        for option in stage["layouts"]:
            assert 0 < option["mfu"] < 1
    assert body["days"] == pytest.approx(sum(stage["layouts"][0]["days"] for stage in body["stages"]))
    assert body["device_hours"] == pytest.approx(body["days"] * 24 * 1024)


def test_a_process_holds_less_of_a_divided_batch() -> None:
    """Sequences are shared out; weights, gradients and optimizer state are not."""
    recipe = load("smoke/pretrain", ["stages.1.sequence_length=128", "model.num_hidden_layers=8"])
    one, four = (plan_process(recipe, n, runtime=0.0) for n in (1, 4))
    assert four.parts["activations"] < one.parts["activations"]
    assert one.parts["weights"] == four.parts["weights"]


@pytest.mark.parametrize("preset", ["glm-4.5", "kimi-k2", "step-3"])
def test_as_many_requests_as_there_is_room(preset: str) -> None:
    config = ModelConfig.model_validate(PRESETS[preset])
    for arrangement in arrangements(config, 16):
        made = Serving(config, KINDS["h200"], 16, arrangement, 8192, 1.0, 2.0, False, 0.5)
        room, most = 130e9, made.most_requests(130e9)
        share = 16 if arrangement == "data-expert" else 1
        used = made.weights() + made.buffers() + most // share * made.request_bytes()
        assert used <= room < used + made.request_bytes()
        assert made.request_bytes() * made.kv_ways == 8192 * kv_bytes_per_token(config)
        steps = [made.decode_seconds(n) for n in (1, 16, 64, 256)]
        assert steps == sorted(steps)


def test_one_request_reads_the_active_weights() -> None:
    """Batch 1 on one device: the bytes of active parameters, head and cache over the bandwidth."""
    config = ModelConfig.model_validate(PRESETS["glm-4.5-air"])
    made = Serving(config, KINDS["b200"], 1, "one device", 1024, 1.0, 2.0, False, 1.0)
    counts = config.parameter_counts()
    read = counts.active + counts.vocabulary / 2 + 1024 * kv_bytes_per_token(config)
    assert made.decode_seconds(1) == pytest.approx(read / 8e12, rel=1e-9)


def test_kinds() -> None:
    assert find_device("h100", memory=94e9).memory == 94e9
    assert find_device("h100", flops=1.0).flops("bf16") == 1.0
    with pytest.raises(RecipeError, match="did you mean 'h200'"):
        find_device("h20")
    with pytest.raises(GlmctlError, match="0 given"):
        check_devices(0)
    machine = this_machine(memory=8e9, flops=1e11, bandwidth=1e10)
    assert split(machine, 4).memory == 2e9
    assert split(H100, 4) == H100


def test_recipes_without_a_plan_say_which_have_one() -> None:
    with pytest.raises(RecipeError, match="pretrain, sft, distill, rl, serve"):
        plan(load("demo/tools"), 1, H100)
    with pytest.raises(RecipeError, match="earlier stage"):
        plan(load("smoke/sft"), 1, H100)
    body = plan(load("smoke/rl"), 1, KINDS["b200"], model="small")
    assert body["stages"][0]["layouts"][0]["memory"]["kept"]["kv"] > 0
