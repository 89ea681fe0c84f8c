"""The options of the DPO family: presets, what types refuse, and what only a finding can report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from llmrl.algo.options import Setting
from llmrl.algo.preference.dpo import DPO as DPOAlgorithm
from llmrl.algo.preference.kto import KTO as KTOAlgorithm
from llmrl.algo.preference.options import DPO, KTO, PRESETS, OnlineDPO, OnlineKTO, Preference

KINDS = [
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "aot", "aot_unpaired", "sft", "simpo", "orpo",
]  # fmt: skip


def make(kind: Any, **given: Any) -> Any:
    return TypeAdapter(kind).validate_python(given)


def loss(kind: str, **given: Any) -> dict[str, Any]:
    return {"kind": kind, **({"label_smoothing": 0.01} if kind == "exo_pair" else {}), **given}


def test_presets() -> None:
    assert all(preset.name == name and not preset.findings() for name, preset in PRESETS.items())
    values = {name: dataclasses.asdict(preset.loss) for name, preset in PRESETS.items()}
    sigmoid = {"kind": "sigmoid", "weight": 1.0, "beta": 0.1, "label_smoothing": 0.0}
    kto = {"kind": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert values == {
        "dpo": sigmoid,
        "online_dpo": sigmoid,
        "cdpo": sigmoid | {"label_smoothing": 0.1},
        "ipo": {"kind": "ipo", "weight": 1.0, "beta": 0.1},
        "simpo": {"kind": "simpo", "weight": 1.0, "beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
        "orpo": {"kind": "sum", "terms": [{"kind": "sft", "weight": 1.0}, {"kind": "orpo", "weight": 0.1}]},
        "kto": kto,
        "online_kto": kto,
    }


@pytest.mark.parametrize("kind", [DPO, OnlineDPO, KTO, OnlineKTO])
def test_values_survive_a_round_trip(kind: Any) -> None:
    options = kind()
    assert make(kind, **dataclasses.asdict(options)) == options


@pytest.mark.parametrize("name", KINDS)
def test_every_loss_reads_only_its_own_options(name: str) -> None:
    options = make(DPO, loss=loss(name))
    assert [term.kind for term in options.terms] == [name]
    assert options.needs_reference == (name not in ("sft", "simpo", "orpo"))
    assert options.sorts_batch == (name in ("aot", "aot_unpaired"))
    read = {field.name for field in dataclasses.fields(options.terms[0])} - {"kind", "weight"}
    assert ("beta" in read) == (name not in ("sft", "orpo"))
    smoothed = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo")
    assert ("label_smoothing" in read) == (name in smoothed)
    with pytest.raises(ValidationError):
        make(DPO, loss=loss(name, desirable_weight=1.0))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (DPO, {"loss": {"kind": "kto"}}),
        (KTO, {"loss": {"kind": "sigmoid"}}),
        (DPO, {"loss": {"kind": "sum", "terms": []}}),
        (DPO, {"loss": {"kind": "sum", "terms": [{"kind": "kto"}]}}),
        (DPO, {"loss": {"kind": "exo_pair"}}),
        (DPO, {"loss": {"kind": "exo_pair", "label_smoothing": 0.0}}),
        (DPO, {"loss": {"kind": "sigmoid", "label_smoothing": 0.5}}),
        (DPO, {"loss": {"kind": "sigmoid", "beta": 0.0}}),
        (DPO, {"loss": {"kind": "ipo", "label_smoothing": 0.1}}),
        (DPO, {"loss": {"kind": "discopop", "tau": 0.0}}),
        (DPO, {"divergence": {"kind": "forward_kl", "coef": 0.5}}),
        (DPO, {"ld_alpha": 1.1}),
        (DPO, {"max_length": 1}),
        (DPO, {"pairs": "all"}),
        (DPO, {"dynamic_sampling": {}}),
        (DPO, {"reference": {"alpha": 0.5}}),
        (DPO, {"reference": {"steps": 0}}),
        (DPO, {"reference": {"steps": 1, "alpha": 0.0}}),
        (OnlineDPO, {"max_length": 512}),
        (OnlineDPO, {"precompute_ref_log_probs": True}),
        (OnlineDPO, {"min_margin": -1.0}),
        (OnlineDPO, {"hierarchy": []}),
        (OnlineDPO, {"hierarchy": [{"margin": 1.0}]}),
        (KTO, {"loss": {"kind": "kto", "desirable_weight": -1.0}}),
        (KTO, {"desirable_above": 0.5}),
        (OnlineKTO, {"ld_alpha": 0.5}),
    ],
    ids=str,
)
def test_what_types_refuse(kind: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make(kind, **given)


SUM_TWICE = {"kind": "sum", "terms": [{"kind": "sft"}, {"kind": "sft"}]}
TWO_SORTS = {"kind": "sum", "terms": [{"kind": "aot"}, {"kind": "aot_unpaired"}]}
AOT, MOVES = {"kind": "aot"}, {"steps": 1}


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (DPO, {"loss": SUM_TWICE}, "algo.loss.terms ['sft', 'sft'] names a loss twice"),
        (DPO, {"loss": TWO_SORTS}, "algo.loss.terms holds aot and aot_unpaired"),
        (DPO, {"loss": AOT, "divergence": {"kind": "forward_kl"}}, "forward_kl is not defined for aot"),
        (DPO, {"loss": {"kind": "sft"}, "divergence": {"kind": "forward_kl"}}, "is not read by algo.loss sft"),
        (DPO, {"loss": AOT, "num_mini_batches": 2}, "algo.loss aot compares all pairs of an optimizer step"),
        (DPO, {"loss": AOT, "ld_alpha": 0.5}, "algo.ld_alpha shortens each pair"),
        (DPO, {"loss": AOT, "use_weighting": True}, "algo.use_weighting weights pairs"),
        (DPO, {"use_weighting": True, "num_iterations": 2}, "algo.use_weighting is measured on the policy"),
        (DPO, {"loss": {"kind": "simpo"}, "reference": MOVES}, "algo.reference is given, but algo.loss simpo"),
        (DPO, {"loss": {"kind": "simpo"}, "precompute_ref_log_probs": True}, "algo.precompute_ref_log_probs is given"),
        (DPO, {"reference": MOVES, "precompute_ref_log_probs": True}, "algo.reference moves the reference"),
        (KTO, {"reference": MOVES, "precompute_ref_log_probs": True}, "algo.reference moves the reference"),
        (KTO, {"ref_cache_dir": "x"}, "algo.ref_cache_dir 'x' is only read with"),
        (OnlineDPO, {"min_margin": 0.1, "hierarchy": [{"part": "a"}]}, "algo.min_margin 0.1 is not read"),
        (OnlineDPO, {"hierarchy": [{"part": "a", "margin_in": "value"}]}, "is only read with a margin above 0"),
        (DPO, {"loss": {"kind": "sft"}, "ld_alpha": 0.5}, "algo.loss sft compares nothing"),
    ],
    ids=str,
)
def test_findings(kind: Any, given: dict[str, Any], expected: str) -> None:
    (found,) = make(kind, **given).findings()
    assert expected in found


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_divergences_fit_losses_of_a_difference_and_likelihood(kind: str) -> None:
    terms = [loss(kind), {"kind": "sft"}]
    options = make(DPO, loss={"kind": "sum", "terms": terms}, divergence={"kind": "js_divergence"})
    assert options.findings() == []


@pytest.mark.parametrize(
    ("options", "rest", "expected"),
    [
        (DPO(), {}, []),
        (DPO(), {"num_generations": None}, []),
        (make(DPO, reference=MOVES), {}, []),
        (
            make(DPO, reference=MOVES),
            {"has_adapters": True},
            ["algo.reference.alpha 0.6 would mix the weights of two adapters"],
        ),
        (KTO(), {"num_prompts": 1}, ["rollout.num_prompts is 1, but algo.loss kto"]),
        (make(KTO, loss={"kind": "apo_zero_unpaired"}), {"num_prompts": 1}, []),
        (DPO(num_mini_batches=5), {}, ["algo.num_mini_batches 5 exceeds rollout.num_prompts 4"]),
        (OnlineDPO(), {"num_generations": 1}, ["rollout.num_generations is 1"]),
        (OnlineKTO(), {"num_generations": 1}, []),
    ],
    ids=str,
)
def test_findings_with_the_rest(options: Preference, rest: dict[str, Any], expected: list[str]) -> None:
    found = options.findings_with(Setting(**{"num_prompts": 4, "num_generations": 4, **rest}))
    assert len(found) == len(expected)
    assert all(text in line for text, line in zip(expected, found, strict=True))


@pytest.mark.parametrize(("algorithm", "kind"), [(DPOAlgorithm, OnlineDPO), (KTOAlgorithm, OnlineKTO)])
def test_algorithms_take_the_schedule_of_their_options(algorithm: Any, kind: Any) -> None:
    options = make(kind, num_iterations=2, num_mini_batches=3, reference={"steps": 4}, dynamic_sampling={})
    made = algorithm(options)
    assert (made.num_iterations, made.num_mini_batches) == (2, 3)
    assert made.needs.ref_sync == (4, 0.6)
    assert made.needs.sampling_batches == 10
    assert algorithm(kind()).needs.sampling_batches == 1
