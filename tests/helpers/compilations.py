"""What JAX compiles."""

import jax


class Compilations:
    """Counts what JAX compiles inside a `with`."""

    def __enter__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event, duration, **said):
        if event.endswith("jaxpr_to_mlir_module_duration"):
            self.names.append(said.get("fun_name", event))
