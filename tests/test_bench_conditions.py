"""The conditions of a benchmark, from the words of macOS' `pmset` and `system_profiler`, which are stand-in programs
here, and from Linux' /sys. Some 0.3 s."""

import sys

import pytest

from mlxeff.bench import conditions, machine
from mlxeff.errors import notices

BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=4)\t83%; discharging; 5:12 remaining present: true"
MAINS = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=4)\t100%; charged; 0:00 remaining present: true"
COOL = "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded"
HOT = "2026-09-01 12:00:00 Thermal warning level set to 1\nCPU_Scheduler_Limit \t= 100\nCPU_Speed_Limit \t= 62"


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """A function that makes this machine look like a Mac whose `pmset` prints these texts."""

    def make(batt="", therm="", settings=""):
        path = tmp_path / "pmset"
        cases = "".join(f"{name!r}) printf '%s' \"{text}\";;\n" for name, text in (("batt", batt), ("therm", therm)))
        path.write_text(f'#!/bin/sh\ncase "$2" in\n{cases}*) printf \'%s\' "{settings}";;\nesac\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        monkeypatch.setattr(sys, "platform", "darwin")

    return make


def test_power_of_a_mac(mac):
    mac(BATTERY, settings=" lowpowermode         1")
    assert conditions.power() == {"source": "battery", "charge": 0.83, "low_power_mode": True}
    mac(MAINS, settings=" lowpowermode         0")
    assert conditions.power() == {"source": "mains", "charge": 1.0, "low_power_mode": False}
    mac("Now drawing from 'AC Power'")  # a Mac mini has no battery
    assert conditions.power() == {"source": "mains", "charge": None, "low_power_mode": None}
    mac("what nobody knows")
    assert conditions.power() == {"source": None, "charge": None, "low_power_mode": None}


def test_thermal_pressure_of_a_mac(mac):
    mac(therm=COOL)
    assert conditions.thermal() == {"celsius": None, "speed_limit": None, "warning": False}
    mac(therm=HOT)
    assert conditions.thermal() == {"celsius": None, "speed_limit": 0.62, "warning": True}
    mac()
    assert conditions.thermal() == {"celsius": None, "speed_limit": None, "warning": None}


def test_cores_of_a_gpu():
    report = '{"SPDisplaysDataType": [{"sppci_model": "Apple M2 Pro", "sppci_cores" : "19"}]}'
    assert machine.cores_of_gpu(report) == 19
    assert machine.cores_of_gpu("") is None


def supply(root, name, **files):
    place = root / "class/power_supply" / name
    place.mkdir(parents=True)
    for file, text in files.items():
        (place / file).write_text(text + "\n")


def test_power_of_linux(tmp_path):
    assert conditions.linux_power(tmp_path) == {"source": None, "charge": None, "low_power_mode": None}
    supply(tmp_path, "mouse", type="Battery", scope="Device", status="Discharging", capacity="9")
    supply(tmp_path, "AC", type="Mains", online="1")
    assert conditions.linux_power(tmp_path)["source"] == "mains"
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", capacity="55")
    assert conditions.linux_power(tmp_path) == {"source": "battery", "charge": 0.55, "low_power_mode": None}


def test_temperature_of_linux(tmp_path):
    assert conditions.linux_thermal(tmp_path)["celsius"] is None
    for number, text in enumerate(("41000", "72500", "damaged")):
        place = tmp_path / f"class/thermal/thermal_zone{number}"
        place.mkdir(parents=True)
        (place / "temp").write_text(text)
    assert conditions.linux_thermal(tmp_path)["celsius"] == 72.5


def test_a_battery_is_said_in_a_line(caplog):
    notices.propagate = True
    conditions.warn_of_battery({"source": "battery", "charge": 0.5, "low_power_mode": True})
    assert [record.getMessage() for record in caplog.records] == [
        "this machine runs on its battery, where it may be slower: plug it in for numbers to compare",
        "the low power mode is on, which makes this machine slower",
    ]
    caplog.clear()
    conditions.warn_of_battery({"source": "mains", "charge": 1, "low_power_mode": False})
    assert not caplog.records


def test_a_command_that_is_missing_or_fails_says_nothing():
    assert conditions.output(["no-such-program-here"]) == ""
    assert conditions.output(["false"]) == ""
