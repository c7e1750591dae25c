from __future__ import annotations

from cascade_rt.benchmark.machine import describe, name_processor

CORE = """\
processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
RASPBERRY_PI_4 = (
    CORE.format(0)
    + CORE.format(1)
    + """\
Revision\t: c03114
Serial\t\t: 100000001a2b3c4d
Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""
)


def core(part: str, features: str = "fp asimd", implementer: str = "0x41") -> str:
    return f"Features\t: {features}\nCPU implementer\t: {implementer}\nCPU part\t: {part}\n\n"


def test_arm_cpus_have_names() -> None:
    assert name_processor(RASPBERRY_PI_4) == "Cortex-A72"
    assert name_processor(core("0xd0c", "fp asimd fphp asimddp ssbs")) == "Neoverse-N1 (asimddp)"
    both = core("0xd05", "asimd asimddp") * 4 + core("0xd0b", "asimd asimddp") * 2
    assert name_processor(both) == "Cortex-A55 + Cortex-A76 (asimddp)"


def test_arm_cpus_without_a_known_name_show_their_codes() -> None:
    assert name_processor(core("0x051", "asimd asimddp i8mm bf16", "0x00")) == "ARM 0x00/0x051 (asimddp i8mm bf16)"
    # The same part of another maker is another CPU.
    assert name_processor(core("0xd49")) == "Neoverse-N2"
    assert name_processor(core("0xd49", implementer="0x6D")) == "Azure Cobalt 100"


def test_x86_cpus_have_their_own_name() -> None:
    text = "model name\t: AMD EPYC 9554\nflags\t\t: fpu avx2 avx512f avx512_vnni\n"
    assert name_processor(text) == "AMD EPYC 9554 (avx2 avx512f avx512_vnni)"
    assert name_processor("model name\t: some CPU\n") == "some CPU"


def test_no_name_is_found_where_there_is_none() -> None:
    assert name_processor("") == ""
    assert name_processor("processor\t: 0\nisa\t: rv64imafdc\n") == ""
    assert describe()["processor"]
