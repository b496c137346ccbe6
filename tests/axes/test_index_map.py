"""Where new channels arrive."""

from zoo import Plan, Stage, built

import dagrow


def plan_dag(**stage) -> dagrow.Dag:
    case = built(Plan((Stage(**stage),), inputs=3, tokens=0))
    return dagrow.trace(case.model, case.batches[0][0])


def test_a_concatenation_with_itself_has_two_columns_per_unit() -> None:
    dag = plan_dag(kind="cat_self", width=3)
    axis = dag.axis("parts.0.up")
    assert axis.layout.columns["head"].tolist() == [[0, 3], [1, 4], [2, 5]]
    landing = dag.widening(axis, 2).columns["head"]
    assert landing.old.tolist() == [0, 1, 2, 5, 6, 7]
    assert landing.new.tolist() == [[3, 8], [4, 9]]


def test_a_concatenation_with_the_input_keeps_the_input_in_its_place() -> None:
    dag = plan_dag(kind="cat_input", width=2)
    landing = dag.widening(dag.axis("parts.0.up"), 1).columns["head"]
    assert (landing.old.tolist(), landing.new.tolist()) == ([0, 1, 3, 4, 5], [[2]])


def test_a_gate_grows_both_halves() -> None:
    dag = plan_dag(kind="gate", width=2)
    axis = dag.axis("parts.0.up")
    assert axis.layout.rows["parts.0.up"].tolist() == [[0, 2], [1, 3]]
    widening = dag.widening(axis, 1)
    assert widening.rows["parts.0.up"].new.tolist() == [[2, 5]]
    assert widening.columns["head"].new.tolist() == [[2]]
