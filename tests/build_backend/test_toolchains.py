"""Which device compiler is taken, what it compiles for, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from usp_build import toolchains
from usp_build.toolchains import Missing, cuda_architectures, hip_architectures

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--dryrun) echo '#$ LIBRARIES=  "-L{folder}/bin/../lib/stubs" "-L{folder}/bin/../lib"' >&2 ;;
esac
"""
CLANG = """#!/bin/sh
case "$*" in
*-mcpu=*) for known in {known}; do case "$*" in *-mcpu=$known*) exit 0 ;; esac; done; exit 1 ;;
*-print-prog-name=*) echo {programs}${{1#*=}} ;;
*--version*) echo "{name}"; echo "Target: none" ;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def nvcc(folder: Path, release: str = "13.0") -> Path:
    return program(folder / "bin" / "nvcc", NVCC.format(release=release, folder=folder))


def clang(path: Path, known: str = "gfx90a gfx942", programs: str = "/usr/bin/") -> Path:
    return program(path, CLANG.format(known=known, programs=programs, name=path.parent))


# -- architectures


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (toolchains.CUDA_DEFAULT, ("sm_80", "sm_90", "compute_90")),
        ("8.0", ("sm_80",)),
        ("9.0a", ("sm_90a",)),
        ("7.5 8.0 8.6 9.0 10.0a 12.0+PTX", ("sm_80", "sm_86", "sm_90", "sm_100a", "sm_120")),
        ("8.0;8.0", ("sm_80",)),
    ],
)
def test_cuda_architectures(listed: str, expected: tuple[str, ...]) -> None:
    if listed.endswith("12.0+PTX"):
        expected = (*expected, "compute_120")
    assert cuda_architectures(listed) == expected


@pytest.mark.parametrize(
    ("listed", "message"),
    [("Hopper", "'Hopper' is not like 8.0"), ("7.0;7.5", "nothing of 8.0 or newer")],
)
def test_cuda_architectures_that_cannot_be(listed: str, message: str) -> None:
    with pytest.raises(Missing, match=message):
        cuda_architectures(listed)


def test_hip_architectures() -> None:
    assert hip_architectures("gfx900;gfx90a;gfx1100,gfx942") == ("gfx90a", "gfx942")
    assert hip_architectures("gfx90a:xnack-") == ("gfx90a:xnack-",)
    with pytest.raises(Missing, match="'gfx1100' holds none of gfx90a, gfx942"):
        hip_architectures("gfx1100")


# -- CUDA


def test_cuda_home_comes_before_the_path(tmp_path: Path) -> None:
    home, other = nvcc(tmp_path / "cuda"), nvcc(tmp_path / "other", "12.4")
    path = {"PATH": f"{other.parent}:/usr/bin:/bin"}
    assert toolchains.find("cuda", path).command == (str(other),)
    assert toolchains.find("cuda", path).version == "nvcc 12.4.88"
    found = toolchains.find("cuda", {**path, "CUDA_HOME": str(tmp_path / "cuda")})
    assert found.command == (str(home),)
    assert found.version == "nvcc 13.0.88"
    assert f"-L{tmp_path}/cuda/lib" in found.link_flags
    assert found.link_flags.index("-lcudart_static") > 1
    assert "-gencode=arch=compute_90,code=sm_90" in found.flags
    assert "-gencode=arch=compute_90,code=compute_90" in found.flags


def test_the_list_of_torch_decides_what_is_compiled_for(tmp_path: Path) -> None:
    nvcc(tmp_path)
    environ = {"CUDA_PATH": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "8.6"}
    assert toolchains.find("cuda", environ).architectures == ("sm_86",)


def test_a_cuda_home_without_nvcc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=f"CUDA_HOME={tmp_path}, but there is no {tmp_path}/bin/nvcc"):
        toolchains.find("cuda", {"CUDA_HOME": str(tmp_path)})


def test_an_old_nvcc_is_refused(tmp_path: Path) -> None:
    nvcc(tmp_path, "11.8")
    with pytest.raises(Missing, match=r"is 11\.8\.88; usp needs 12\.0 or newer"):
        toolchains.find("cuda", {"CUDA_HOME": str(tmp_path)})


def test_without_nvcc_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchains.Path, "is_file", lambda path: False)
    with pytest.raises(Missing, match=r"install the CUDA toolkit .* or set CUDA_HOME"):
        toolchains.find("cuda", {"PATH": "/nowhere"})


# -- HIP


def test_the_clang_of_rocm_comes_before_the_path(tmp_path: Path) -> None:
    rocm, other = clang(tmp_path / "rocm/llvm/bin/clang++"), clang(tmp_path / "bin/clang++-19")
    path = {"PATH": str(other.parent), "ROCM_PATH": str(tmp_path / "empty")}
    assert toolchains.find("hip", path).command == (str(other),)
    found = toolchains.find("hip", {**path, "ROCM_PATH": str(tmp_path / "rocm")})
    assert found.command == (str(rocm),)
    assert found.version == str(rocm.parent)
    assert found.architectures == ("gfx90a", "gfx942")
    assert {"--offload-arch=gfx90a", "--offload-arch=gfx942"} <= set(found.flags)
    assert found.link_flags == (f"-L{tmp_path}/rocm/lib", "-lamdhip64")
    named = toolchains.find("hip", {**path, "HIPCXX": str(rocm)})
    assert named.command == (str(rocm),)


def test_a_compiler_is_a_program_or_words(tmp_path: Path) -> None:
    there = program(tmp_path / "a folder" / "c++", "#!/bin/sh\n")
    assert toolchains.command_of(str(there)) == [str(there)]
    assert toolchains.command_of("ccache c++ -m64") == ["ccache", "c++", "-m64"]
    assert toolchains.command_of(f"ccache '{there}'") == ["ccache", str(there)]


def test_an_older_clang_compiles_for_what_it_knows_unless_told(tmp_path: Path) -> None:
    old = clang(tmp_path / "clang++", known="gfx90a")
    environ = {"HIPCXX": str(old), "ROCM_PATH": str(tmp_path)}
    assert toolchains.find("hip", environ).architectures == ("gfx90a",)
    with pytest.raises(Missing, match=r"clang\+\+ cannot compile for gfx942"):
        toolchains.find("hip", {**environ, "PYTORCH_ROCM_ARCH": "gfx90a;gfx942"})


def test_a_clang_without_its_tools_is_passed_over(tmp_path: Path) -> None:
    bare = clang(tmp_path / "a/clang++-20", programs="")
    whole = clang(tmp_path / "b/clang++-19")
    environ = {"PATH": f"{bare.parent}:{whole.parent}", "ROCM_PATH": str(tmp_path)}
    assert toolchains.find("hip", environ).command == (str(whole),)
    message = "clang-20 lacks clang-offload-bundler and lld"
    with pytest.raises(Missing, match=message.replace("clang-20", r"clang\+\+-20")):
        toolchains.find("hip", {**environ, "PATH": str(bare.parent)})


def test_without_clang_it_is_said_what_to_install(tmp_path: Path) -> None:
    environ = {"PATH": "/nowhere", "ROCM_PATH": str(tmp_path)}
    with pytest.raises(Missing, match=r"no clang\+\+ found.*ROCM_PATH.*apt-get install clang-19"):
        toolchains.find("hip", environ)


# -- devices


def test_a_gpu_is_seen_by_its_device_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert not toolchains.gpu_present("cuda", tmp_path)
    assert not toolchains.gpu_present("hip", tmp_path)
    (tmp_path / "kfd").touch()
    assert toolchains.gpu_present("hip", tmp_path)
    smi = program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert not toolchains.gpu_present("cuda", tmp_path)
    program(smi, "#!/bin/sh\nexit 0\n")
    assert toolchains.gpu_present("cuda", tmp_path)
    smi.unlink()
    (tmp_path / "nvidia0").touch()
    assert toolchains.gpu_present("cuda", tmp_path)


def test_a_compiler_that_cannot_be_run_knows_nothing(tmp_path: Path) -> None:
    environ = {"HIPCXX": str(tmp_path / "missing"), "ROCM_PATH": str(tmp_path)}
    with pytest.raises(Missing, match="missing knows none of gfx90a, gfx942"):
        toolchains.find("hip", environ)
