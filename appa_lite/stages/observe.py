"""``observe``: the observation file that a network of instruments would have made of a truth."""

from omegaconf import DictConfig, OmegaConf

from appa_lite.config import build
from appa_lite.core.errors import UserError
from appa_lite.core.store import provenance
from appa_lite.data.open import open_fields
from appa_lite.observations.network import Network
from appa_lite.observations.observe import observe
from appa_lite.observations.options import TableOptions
from appa_lite.observations.table import write_table


def run(cfg: DictConfig) -> None:
    """Observe one trajectory of ``cfg.truth`` from ``cfg.start`` to ``cfg.end`` and write the table to ``cfg.out``."""
    wanted = cfg.network.get("networks")
    if not wanted:
        raise UserError("this network reads real observation files: it has no instruments to simulate; choose one with 'networks'")
    networks = [build(entry, Network) for entry in (wanted.values() if hasattr(wanted, "values") else wanted)]
    dataset, spec = open_fields(cfg.truth, options={"start": cfg.start, "end": cfg.end})
    for dim in {"trajectory", "number"} & set(dataset.dims):
        if not 0 <= cfg.trajectory < dataset.sizes[dim]:
            raise UserError(f"trajectory={cfg.trajectory}: {cfg.truth} has {dataset.sizes[dim]}, numbered from 0")
        dataset = dataset.isel({dim: cfg.trajectory})
    options = TableOptions.parse(OmegaConf.to_container(cfg.network))
    table = observe(spec.to_tensor(dataset), spec, dataset["time"].values, networks, cfg.seed, options)
    table.attrs = provenance(cfg, cfg.seed, [cfg.truth])
    write_table(cfg.out, table)
    counts = ", ".join(f"{count} {name}" for name, count in table["variable"].value_counts().items())
    first, last = table["time"].min(), table["time"].max()
    print(f"{cfg.out}: {len(table)} observations ({counts}) from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}")
