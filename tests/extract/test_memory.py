"""Free memory is that of the machine, or of the container if that is less."""

from types import SimpleNamespace

import psutil

from sail_align.extract.system import memory


def test_free_memory_is_limited_by_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000))
    assert memory.free_memory() == 4_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\ninactive_file 400\n")
    assert memory.free_memory() == 4_000
    (tmp_path / "memory.max").write_text("3000\n")
    assert memory.free_memory() == 3_000 - 2_000 + 400
