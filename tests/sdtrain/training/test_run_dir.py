import pytest

from sdtrain.training.run_dir import StepTable


@pytest.fixture
def table(tmp_path):
    made = StepTable(tmp_path / "log.csv", ("step", "loss", "mfu"))
    made.truncate(0)
    return made


def test_rows_come_back_and_missing_values_are_empty(table):
    table.add(step=1, loss=0.5, mfu=None)
    assert table.rows() == [{"step": "1", "loss": "0.5", "mfu": ""}]


def test_what_came_after_the_checkpoint_is_forgotten(table):
    for step in range(5):
        table.add(step=step, loss=0.1, mfu=0.2)
    assert [row["step"] for row in table.truncate(3)] == ["0", "1", "2", "3"]
    assert [row["step"] for row in table.rows()] == ["0", "1", "2", "3"]


def test_a_row_cut_short_by_a_crash_is_left_out(table):
    table.add(step=1, loss=0.5, mfu=0.1)
    with table.path.open("a") as file:
        file.write("2,0.")
    assert [row["step"] for row in table.rows()] == ["1"]


def test_a_file_of_an_earlier_version_gets_the_new_columns(table):
    table.path.write_text("step,loss,gone\n1,0.5,x\n")
    table.truncate(1)
    table.add(step=2, loss=0.4, mfu=0.3)
    assert table.rows() == [{"step": "1", "loss": "0.5", "mfu": ""}, {"step": "2", "loss": "0.4", "mfu": "0.3"}]
