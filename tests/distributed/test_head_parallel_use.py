"""What else a head-parallel run does: inference, accumulation, autocast, scores, logs, memory, and what it refuses."""

import copy

import numpy as np
import pytest
import torch

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer, Operation
from d2ft_peft.engine import get_runtime
from d2ft_peft.head_parallel import HeadParallel
from d2ft_peft.scores import INDEX_KEY, score_samples
from tests.distributed.head_parallel import Case, batches_of, join, model_of, random_schedule, rank
from tests.distributed.launch import run


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

FIVE = (3, 2, 3, 1, 2)


def on_two_ranks() -> dict:
    """Everything that two ranks do; starting processes takes longer than the runs."""
    join()
    return {
        "errors": errors(),
        "inference": inference(),
        "accumulated": accumulated_gradients(),
        "autocast": autocast_gradients(HeadParallel),
        "scores": weight_magnitude(),
        "sizes": sizes_and_logs(),
        "scores from before": scores_from_before(),
        "capacities": capacities(),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run(__name__, "on_two_ranks", tmp_path_factory.mktemp("use"), processes=2)


def inference() -> torch.Tensor:
    """Logits of a batch that all ranks have."""
    case = Case("bert", "boundary", FIVE)
    model = model_of(case, head_parallel=True)
    HeadParallel(model)
    with torch.no_grad():
        return model.eval()(**batches_of(case, 0)[1]).logits


def test_inference_runs_every_head(two_ranks):
    case = Case("bert", "boundary", FIVE)
    with torch.no_grad():
        expected = model_of(case, head_parallel=False).eval()(**batches_of(case, 0)[1]).logits
    for of_rank in two_ranks:
        torch.testing.assert_close(of_rank["inference"], expected)


def accumulated_gradients() -> torch.Tensor:
    """Largest difference between the gradients of a step and half of those of two without zeroing between them."""
    case = Case("vit", "boundary", (1, 2))
    model = model_of(case, head_parallel=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of the whole model: to be forgotten
    parallel = HeadParallel(model)
    once, twice = [], []
    for gradients in (once, twice):
        parallel.forward_backward(batches_of(case, 0), random_schedule(case, 0))
        gradients += [p.grad.clone() for p in parallel.model.parameters() if p.grad is not None]
    return torch.stack([(b / 2 - a).abs().max() for a, b in zip(once, twice, strict=True)]).max()


def test_gradients_of_several_steps_add_up(two_ranks):
    for of_rank in two_ranks:
        assert of_rank["accumulated"] < 1e-12


def autocast_gradients(parallel=None) -> dict[str, torch.Tensor]:
    """Gradients of LoRA in bfloat16 where heads of a rank differ, of one process or of several."""
    case = Case("llama", "lora", (2, 2, 1))
    model = model_of(case, head_parallel=parallel is not None).float()
    schedule, batches = random_schedule(case, 0), batches_of(case, 0)
    with torch.autocast("cpu", torch.bfloat16):
        if parallel is None:
            planner = D2FTPlanner(model)
            planner.use(schedule)
            for i, batch in enumerate(batches):
                with planner.micro_batch(i) as micro_batch:
                    (model(**batch).loss * micro_batch.weight).backward()
        else:
            parallel(model).forward_backward(batches, schedule)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "v_proj.lora_A" in name}


def test_autocast_loses_no_gradient(two_ranks):
    theirs = autocast_gradients()
    for name, gradient in two_ranks[0]["autocast"].items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0.05, atol=0.02 * float(theirs[name].abs().max()))


def weight_magnitude() -> torch.Tensor:
    case = Case("vit", "boundary", FIVE)
    planner = HeadParallel(model_of(case, head_parallel=True)).planner
    return torch.from_numpy(planner.source.of("weight_magnitude", None, 0))


def test_ranks_score_the_whole_model(two_ranks):
    source = D2FTPlanner(model_of(Case("vit", "boundary", FIVE), head_parallel=False)).source
    expected = torch.from_numpy(source.of("weight_magnitude", None, 0))
    for of_rank in two_ranks:
        torch.testing.assert_close(of_rank["scores"], expected)


def scores_from_before() -> tuple[list[list[int]], torch.Tensor]:
    """Operations of a step by Fisher scores that were made before the model was cut, and the scores [n, K]."""
    case = Case("vit", "full", (1,) * 5)
    model = model_of(case, head_parallel=True, num_full=2, backward_score="fisher")
    batches = [{**batch, INDEX_KEY: torch.tensor([i])} for i, batch in enumerate(batches_of(case, 0))]
    table = score_samples(model, get_runtime(model).partitions["default"], copy.deepcopy(batches), "fisher")
    parallel = HeadParallel(model)
    parallel.planner.scores["fisher"] = table
    parallel.forward_backward(batches)
    return parallel.planner.schedule.operations.tolist(), torch.from_numpy(table.values)


def test_scores_from_before_the_cut_choose_micro_batches_for_a_rank_as_a_whole(two_ranks):
    for of_rank in two_ranks:
        operations, scores = of_rank["scores from before"]
        operations = torch.tensor(operations)
        for heads in ([0, 1], [2, 3]):
            owned = torch.arange(12).view(3, 4)[:, heads].flatten()
            best = scores[:, owned].double().sum(1).topk(2).indices
            expected = torch.zeros(5, len(owned), dtype=torch.int64)
            expected[best] = Operation.FULL
            torch.testing.assert_close(operations[:, owned], expected)


def sizes_and_logs() -> dict:
    """A step that the planner schedules by itself: what this rank holds, what it logs."""
    case = Case("llama", "boundary", (2,) * 5)
    model = model_of(case, head_parallel=True, num_full=3)
    whole = sum(p.numel() for p in model.parameters())
    parallel = HeadParallel(model)
    parallel.forward_backward(batches_of(case, 0))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    moments = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim)
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    return {"whole": whole, "here": parallel.num_parameters, "moments": moments, "gradients": gradients,
            "logs": parallel.planner.pop_logs()}  # fmt: skip


def capacities() -> list[float]:
    """What the planner gives two ranks, one of which may do half of what the other does, as executed."""
    case = Case("vit", "full", (2,) * 5)
    parallel = HeadParallel(
        model_of(case, head_parallel=True, device_capacities=[0.8, 0.4], forward_score="weight_magnitude")
    )
    parallel.forward_backward(batches_of(case, 0))
    executed = parallel.planner.counts.last
    return (executed.loads / executed.full_loads).tolist()


def test_a_slower_rank_gets_less_work(two_ranks):
    for of_rank in two_ranks:
        assert of_rank["capacities"] == pytest.approx([0.8, 0.4])


def test_a_rank_holds_its_own_heads_only(two_ranks):
    model = model_of(Case("llama", "boundary", FIVE), head_parallel=False)
    base = model.get_base_model()
    partition = D2FTPlanner(model).partition
    # Weights, and what is trained beside the frozen originals: half of each projection is elsewhere.
    projections = [base.get_submodule(name) for name in partition.projections]
    cut = sum(p.numel() for module in projections for p in module.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for of_rank in two_ranks:
        sizes = of_rank["sizes"]
        assert sizes["here"] == sizes["whole"] - cut / 2
        assert sizes["gradients"] == trained - cut / 4
        assert sizes["moments"] == 2 * sizes["gradients"]


def test_logs_tell_what_all_ranks_executed(two_ranks):
    for of_rank in two_ranks:
        assert of_rank["sizes"]["logs"]["compute_ratio"] == pytest.approx(0.6)
        assert of_rank["sizes"]["logs"]["workload_variance"] == 0


def message(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors() -> dict[str, str]:
    """What two ranks say to different schedules, batches, weights, and to what is not supported."""
    case = Case("vit", "full", (1, 2, 1))
    parallel = HeadParallel(model_of(case, head_parallel=True))
    batches, schedule = batches_of(case, 0), random_schedule(case, 0)
    step = parallel.forward_backward
    said = {
        "batches": message(lambda: step(batches_of(case, rank()), schedule)),
        "schedules": message(lambda: step(batches, random_schedule(case, rank()))),
        "shape": message(lambda: step(batches[:2], schedule)),
        "nothing": message(lambda: step(batches, type(schedule)(np.zeros_like(schedule.operations)))),
        "labels": message(lambda: step([{"pixel_values": b["pixel_values"]} for b in batches], schedule)),
        "outside": message(lambda: parallel.model(**batches[0])),
        "saving a part": message(lambda: parallel.model.save_pretrained("unused")),
        "merging a part": message(lambda: parallel.model.merge_and_unload()),
        "still works": message(lambda: step(batches, schedule)),
        "weights": message(lambda: HeadParallel(model_of(case, head_parallel=True, seed=rank()))),
        "capacities": message(lambda: HeadParallel(model_of(case, head_parallel=True, device_capacities=[0.5] * 3))),
        "not asked for": message(lambda: HeadParallel(model_of(case, head_parallel=False))),
    }
    parallel.model.gradient_checkpointing_enable()
    said["checkpointing"] = message(lambda: step(batches, schedule))
    parallel.model.eval()
    said["eval"] = message(lambda: step(batches, schedule))
    text = Case("bert", "full", (2, 2))
    parallel, uneven = HeadParallel(model_of(text, head_parallel=True)), batches_of(text, 0)
    uneven[1] = {name: value[:, :5] if value.ndim == 2 else value for name, value in uneven[1].items()}
    said["lengths"] = message(lambda: parallel.forward_backward(uneven, random_schedule(text, 0)))
    return said


@pytest.mark.parametrize(
    ("what", "says"),
    {
        "schedules": "ValueError: the schedules on rank 1 differ from those on rank 0",
        "batches": "ValueError: the micro-batches on rank 1 differ from those on rank 0; give every rank of a",
        "weights": "ValueError: the weights on rank 1 differ from those on rank 0; set the same seed",
        "shape": "ValueError: schedule has shape (3, 12) instead of (2, 12)",
        "nothing": "ValueError: schedule is SHORTCUT everywhere",
        "labels": "ValueError: the model returned no loss for a batch with keys ['pixel_values']; give labels",
        "outside": "RuntimeError: a head-parallel model ran a forward with gradients outside",
        "capacities": "ValueError: num_devices=None and device_capacities=[0.5, 0.5, 0.5] do not fit 2 processes",
        "not asked for": "ValueError: PeftModel has adapters ['default']; HeadParallel needs exactly one, made by",
        "checkpointing": "ValueError: gradient checkpointing would repeat every exchange",
        "eval": "ValueError: model.training=False",
        "saving a part": "ValueError: this rank holds a part of the adapter only; call HeadParallel.save_pretrained",
        "merging a part": "ValueError: this rank holds a part of the adapter only; save it with HeadParallel",
        "lengths": "ValueError: 'input_ids' has samples of shapes [(5,), (7,)]",
        "still works": "no error",
    }.items(),
)
def test_errors_speak_on_every_rank(two_ranks, what, says):
    for of_rank in two_ranks:
        assert of_rank["errors"][what].startswith(says)


def test_one_process_is_told_to_start_more():
    with pytest.raises(ValueError, match="torchrun"):
        HeadParallel(model_of(Case("vit", "full", FIVE), head_parallel=True))


def test_what_does_not_drive_a_head_parallel_model_says_so():
    model = model_of(Case("vit", "full", FIVE), head_parallel=True)
    with pytest.raises(ValueError, match="head_parallel=True.*HeadParallel"):
        D2FTPlanner(model)
    with pytest.raises(ValueError, match="head_parallel=True.*torchrun"):
        D2FTTrainer(model=model).train()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"shortcut": "mean"}, "shortcut='mean' needs the features of all heads"),
        ({"policy": "importance"}, "rows='samples' skips whole samples"),
        ({"backward_score": "loss"}, "backward_score='loss' is not followed"),
        ({"r": 4, "lora_bias": True}, "lora_bias=True is not available"),
        ({"head_parallel": "yes"}, "head_parallel='yes' must be True or False"),
    ],
)
def test_config_refuses(fields, says):
    with pytest.raises(ValueError, match=says):
        D2FTConfig(**{"head_parallel": True, **fields})
