"""A Ray cluster of two nodes, one of which dies, writes the same store as one process."""

import os
from pathlib import Path

import pytest
from fakes import FakeChoice

from sail_align.extract.errors import UserError
from sail_align.extract.executor.job import Job
from sail_align.extract.executor.local import LocalExecutor
from sail_align.extract.executor.run import run_job
from sail_align.extract.executor.worker import Share
from sail_align.extract.manifest import find_manifest
from sail_align.extract.store import store as store_module

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _workers_can_import_fakes():
    tests = str(Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tests}:{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield


@pytest.fixture(autouse=True)
def _leave_the_cluster():
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(_workers_can_import_fakes):
    """A cluster of two nodes on this machine, which misses a lost one within seconds."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    soon = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "_system_config": soon})
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()  # before the nodes end
    cluster.shutdown()


def test_driver_raises_the_user_error_of_a_worker(pictures, cluster):
    from sail_align.extract.executor.ray_cluster import RayCluster

    manifest, root = find_manifest(str(pictures / "pictures.yaml"))
    job = Job(manifest, root, pictures / "s.zarr", FakeChoice("nothing"), None, ())
    with pytest.raises(UserError, match=r"^There is no encoder of nothing\.$"):
        run_job(job, RayCluster(cluster.address, "1", "cpu"), Share(), quiet=True)


def test_store_is_byte_identical_after_the_loss_of_a_node(pictures, cluster, monkeypatch):
    from sail_align.extract.executor.ray_cluster import RayCluster

    monkeypatch.setattr(store_module, "_shard_rows", lambda rows: 60)
    manifest, root = find_manifest(str(pictures / "pictures.yaml"))

    def job(name: str, seconds: float) -> Job:
        log = pictures / f"{name}.log"
        choices = [FakeChoice(kind, log, seconds) for kind in ("image", "text")]
        return Job(manifest, root, pictures / name, *choices, ("raw", "long"))

    run_job(job("local.zarr", 0), LocalExecutor(["cpu"]), Share(), quiet=True)
    victim, committed = next(iter(cluster.worker_nodes)), 0
    executor = RayCluster(cluster.address, "2", "cpu")
    job_on_ray = job("ray.zarr", 0.1)

    original = RayCluster.execute

    def execute(self, job, share, tally):
        receive = tally.receive

        def remove_node_after_10_shards(event, worker=0):
            nonlocal committed
            committed += event.kind == "committed"
            if committed == 10 and event.kind == "committed":
                cluster.remove_node(victim, allow_graceful=False)
            receive(event, worker)

        tally.receive = remove_node_after_10_shards
        original(self, job, share, tally)

    monkeypatch.setattr(RayCluster, "execute", execute)
    summary = run_job(job_on_ray, executor, Share(), quiet=True)
    assert len(cluster.list_all_nodes()) == 1
    assert contents(pictures / "ray.zarr") == contents(pictures / "local.zarr")
    encoded = (pictures / "ray.zarr.log").read_text().splitlines()
    assert set(encoded) == set((pictures / "local.zarr.log").read_text().splitlines())
    print({"shards": len(set(encoded)), "encoded again": len(encoded) - len(set(encoded)), "summary": str(summary)})
    assert len(encoded) - len(set(encoded)) <= 2  # what the lost node had


def test_default_address_never_joins_another_cluster(pictures, monkeypatch):
    from sail_align.extract.executor.ray_cluster import RayCluster

    def init(address: str, **_options) -> None:
        raise ConnectionError(address)

    monkeypatch.setattr(ray, "init", init)
    manifest, root = find_manifest(str(pictures / "pictures.yaml"))
    job = Job(manifest, root, pictures / "s.zarr", FakeChoice("image"), None, ())
    for asked, environment, joined in [(None, "", "local"), (None, "b:2", "b:2"), ("c:3", "b:2", "c:3")]:
        monkeypatch.setenv("RAY_ADDRESS", environment)
        with pytest.raises(UserError, match=f"no Ray cluster answers at '{joined}'"):
            run_job(job, RayCluster(asked, "1", "cpu"), Share(), quiet=True)
