"""What is read off the record of a step."""

from dagrow.pictures import Grown, Record


def record(validation_loss: float | None, *parameters: int) -> Record:
    grown = tuple(Grown("a", "MoveWeights()", 0, 0.1, None, 1.0, 0.5, 0.4, count, 0) for count in parameters)
    return Record(3, 1.5, 0.5, validation_loss, True, 0.2, grown, {"a": 4}, 20, 40)


def test_the_loss_is_that_of_validation_where_there_is_one() -> None:
    assert record(None).loss == 0.5
    assert record(0.0).loss == 0.0


def test_moves_of_weights_add_nothing() -> None:
    step = record(None, 0, 5, 0, 7)
    assert [grown.parameters for grown in step.added] == [5, 7]
    assert not record(None, 0).added
