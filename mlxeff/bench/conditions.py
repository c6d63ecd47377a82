"""The conditions under which a benchmark runs, which change from run to run: power supply, thermal pressure. A laptop
on its battery and a hot machine are slower. What the system does not tell is None.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import notices

SYS = Path("/sys")


def power() -> dict:
    """{"source": "mains", "battery" or None, "charge": 0 to 1 of the battery, "low_power_mode": of macOS}."""
    return _mac_power(output(["pmset", "-g", "batt"]), output(["pmset", "-g"])) if _mac() else linux_power()


def thermal() -> dict:
    """{"celsius": of the hottest sensor on Linux, "speed_limit": share of the full speed that macOS allows, "warning":
    whether macOS has noted a thermal warning}."""
    return _mac_thermal(output(["pmset", "-g", "therm"])) if _mac() else linux_thermal()


def warn_of_battery(found: dict) -> None:
    """Say where speed is not what the machine has: on a battery, or in the low power mode."""
    if found["source"] == "battery":
        notices.warning("this machine runs on its battery, where it may be slower: plug it in for numbers to compare")
    if found["low_power_mode"]:
        notices.warning("the low power mode is on, which makes this machine slower")


def _mac() -> bool:
    return sys.platform == "darwin"


def output(command: list[str]) -> str:
    """What a command prints; "" where it is missing, fails or takes longer than ten seconds."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def _mac_power(battery: str, settings: str) -> dict:
    """From `pmset -g batt` and `pmset -g`."""
    source = re.search(r"drawing from '(AC|Battery) Power'", battery)
    charge = re.search(r"(\d+)%;", battery)
    mode = re.search(r"lowpowermode\s+(\d)", settings)
    return {
        "source": source and {"AC": "mains", "Battery": "battery"}[source[1]],
        "charge": int(charge[1]) / 100 if charge else None,
        "low_power_mode": mode and mode[1] != "0",
    }


def _mac_thermal(text: str) -> dict:
    """From `pmset -g therm`."""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    none = "No thermal warning level has been recorded" in text
    return {
        "celsius": None,
        "speed_limit": int(limit[1]) / 100 if limit else None,
        "warning": (not none and "warning level" in text) if text else None,
    }


def linux_power(root: Path = SYS) -> dict:
    """From /sys/class/power_supply. None where it has neither battery nor supply, as in a
    virtual machine."""
    supplies = {place: _word(place / "type") for place in sorted((root / "class/power_supply").glob("*"))}
    batteries = [place for place, kind in supplies.items() if kind == "Battery" and _word(place / "scope") != "Device"]
    mains = [_word(place / "online") for place, kind in supplies.items() if kind in ("Mains", "USB")]
    discharging = any(_word(place / "status") == "Discharging" for place in batteries)
    charges = [int(text) / 100 for place in batteries if (text := _word(place / "capacity")).isdigit()]
    source = "battery" if discharging else "mains" if "1" in mains or batteries else None
    return {"source": source, "charge": charges[0] if charges else None, "low_power_mode": None}


def linux_thermal(root: Path = SYS) -> dict:
    """From /sys/class/thermal."""
    found = [_word(place) for place in sorted((root / "class/thermal").glob("thermal_zone*/temp"))]
    celsius = [int(text) / 1000 for text in found if text.lstrip("-").isdigit()]
    return {"celsius": max(celsius, default=None), "speed_limit": None, "warning": None}


def _word(path: Path) -> str:
    """The text of a small file; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
