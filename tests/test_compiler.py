"""Options of the compiler."""

from __future__ import annotations

from janusflow_jax import config as c
from janusflow_jax.parallel import compiler, sharding


def test_an_unknown_option_is_left_out_with_a_warning(monkeypatch, capsys):
    known = {"xla_llvm_disable_expensive_passes": True}
    monkeypatch.setattr(compiler, "OPTIONS", {"cpu": {"xla_no_such_option": True} | known})
    mesh = sharding.make_mesh(c.MeshConfig())
    assert compiler.options(mesh) == known
    assert "xla_no_such_option" in capsys.readouterr().out
