import pytest

from sdtrain.errors import UserError
from sdtrain.impact import energy
from sdtrain.impact.carbon import CORE_W, emissions_kg, energy_kwh, find_region, regions
from sdtrain.impact.energy import EnergyLog, GpuCounter, Spent, cpu_counters, gpu_counters
from sdtrain.impact.footprint import footprint
from sdtrain.impact.gpus import board_watts, peak_tflops
from sdtrain.training.energy import EnergyRecorder, Meter


def spent(session="a", step=1, **changes):
    known = {
        "device": "NVIDIA A100-PCIE-40GB", "num_devices": 2, "num_hosts": 1, "on_gpu": 1, "device_hours": 2.0,
        "measured_hours": 2.0, "gpu_kwh": 0.4, "host_hours": 1.0, "measured_host_hours": 1.0, "cpu_kwh": 0.1,
        "core_hours": 1.0,
    }  # fmt: skip
    return Spent(session, step, **known | changes)


def write_zone(folder, zone, name, energy_uj, range_uj=1000_000):
    path = folder / zone
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, *readings):
        self.readings = list(readings)

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        reading = self.readings.pop(0)
        if reading is None:
            raise self.NVMLError
        return reading


def test_the_model_card_of_sd_v1_comes_out():
    kwh = energy_kwh(150_000, board_watts("A100 PCIe 40GB"))
    assert emissions_kg(kwh, find_region("AWS/us-east").kg_per_kwh) == pytest.approx(11_250)


def test_the_data_centre_around_the_computers_counts_where_it_is_stated():
    assert emissions_kg(10, 0.5, pue=1.2) == pytest.approx(6)


def test_an_unknown_region_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'aws/us-est-1'.*Did you mean .*'aws/us-east-1'"):
        find_region("aws/us-est-1")


def test_every_region_has_an_intensity_of_this_world():
    assert all(0.01 < region.kg_per_kwh < 1.1 for region in regions().values())


def test_longer_names_of_gpus_go_before_shorter_ones():
    assert [board_watts(f"NVIDIA {name}") for name in ("A100-SXM4-80GB", "H100 PCIe", "H200", "GB200", "A10")] == [
        *(400, 350, 700, 1200, 150)
    ]
    assert [board_watts(f"NVIDIA {name}") for name in ("L40", "L4", "H100 NVL", "H100 80GB HBM3")] == [
        300,
        72,
        400,
        700,
    ]
    assert board_watts("NVIDIA RTX A1000") is None, "no A100"
    assert board_watts("NVIDIA GeForce RTX 4090 Laptop GPU") is None, "a laptop's draws less"
    assert board_watts("AMD EPYC") is None
    assert (board_watts("NVIDIA GH200 480GB"), peak_tflops("NVIDIA GH200 480GB")) == (None, 989.4)


def test_a_gpu_counts_from_where_it_was_first_read():
    counter = GpuCounter(FakeNvml(5_000, 5_000, 9_500), "GPU-1")
    assert [counter.joules(), counter.joules()] == [0, 4.5]


def test_a_gpu_whose_driver_came_anew_or_went_is_not_measured():
    counter = GpuCounter(FakeNvml(5_000, 100, None), "GPU-1")
    assert [counter.joules(), counter.joules()] == [None, None]


def test_without_a_driver_no_gpu_is_measured():
    assert gpu_counters(["GPU-none"]) is None


def test_packages_and_memory_add_up_and_nothing_twice(tmp_path):
    package = write_zone(tmp_path, "intel-rapl:0", "package-0", 100, range_uj=10**9)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 100)
    memory = write_zone(tmp_path, "intel-rapl:0:1", "dram", 50)
    write_zone(tmp_path, "intel-rapl:1", "psys", 10)
    found = cpu_counters(tmp_path)
    assert len(found) == 2
    (package / "energy_uj").write_text("2000100")
    (memory / "energy_uj").write_text("500050")
    assert sum(counter.joules() for counter in found) == pytest.approx(2.5)


def test_a_counter_that_wrapped_around_goes_on(tmp_path):
    package = write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000, range_uj=999_999)
    (counter,) = cpu_counters(tmp_path)
    for reading in (950_000, 50_000, 40_000):
        (package / "energy_uj").write_text(str(reading))
        last = counter.joules()
    assert last == pytest.approx(0.05 + 0.1 + 0.99)


def test_counters_that_only_root_may_read_are_no_counters(tmp_path, monkeypatch):
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def forbidden(self):
        raise PermissionError

    monkeypatch.setattr(energy.RaplCounter, "_read", forbidden)
    assert cpu_counters(tmp_path) is None
    assert cpu_counters(tmp_path / "none") is None


def test_a_meter_that_missed_something_measures_nothing_from_then_on():
    class Failing:
        def __init__(self):
            self.readings = [1.0, None, 3.0]

        def joules(self):
            return self.readings.pop(0)

    meter = Meter([Failing()])
    assert [meter.joules(), meter.joules(), meter.joules()] == [1.0, None, None]
    meter.close()


def test_sessions_add_up_with_what_a_killed_one_did_in_vain(tmp_path):
    log = EnergyLog(tmp_path / "energy.csv")
    for line in (spent("a", 10, gpu_kwh=0.1), spent("a", 20, gpu_kwh=0.2), spent("b", 15, gpu_kwh=0.05)):
        log.add(line)
    with log.path.open("a") as file:
        file.write("b,16,NVIDIA")  # the machine went down
    assert [(s.session, s.step, s.gpu_kwh) for s in log.sessions()] == [("a", 20, 0.2), ("b", 15, 0.05)]
    assert footprint(log.sessions()).gpu_kwh == pytest.approx(0.25)


def test_a_file_that_is_no_such_log_is_named(tmp_path):
    (tmp_path / "energy.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match=r"energy\.csv"):
        EnergyLog(tmp_path / "energy.csv").sessions()


def test_hours_without_a_counter_are_taken_at_the_boards_power():
    made = footprint([spent(measured_hours=0.5, measured_host_hours=0, cpu_kwh=0)])
    assert made.gpu_kwh == pytest.approx(0.4 + 1.5 * 0.25)
    assert made.cpu_kwh == pytest.approx(CORE_W / 1000)
    assert (made.measured_gpu, made.measured_cpu, made.board_w) == (0.25, 0, 250)


def test_a_gpu_of_unknown_power_leaves_the_energy_unknown_unless_told():
    lines = [spent(device="Accelerator X", measured_hours=0)]
    assert footprint(lines).kwh is None
    assert footprint(lines, gpu_watts=100).gpu_kwh == pytest.approx(0.6)


def test_a_run_on_cpus_counts_the_machine_or_else_its_busy_cores(tmp_path, ranks):
    class Steady:
        def joules(self):
            return 7200.0

    for open_cpu in (lambda: [Steady()], lambda: None):
        with EnergyRecorder(tmp_path, ranks, open_cpu=open_cpu) as recorder:
            recorder.add(3)
    first, second = EnergyLog(tmp_path / "energy.csv").sessions()
    assert first.cpu_kwh == pytest.approx(0.002)
    assert (first.measured_host_hours, second.measured_host_hours) == (pytest.approx(first.host_hours), 0)
    assert (second.num_devices, second.num_hosts, second.on_gpu, second.gpu_kwh) == (1, 1, 0, 0)
