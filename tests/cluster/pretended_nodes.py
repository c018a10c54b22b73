"""The provider of `test_autoscaling`: Ray's pretended nodes on this machine, of which each type has memory as well."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class PretendedNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's own passes a node type's memory on as a custom resource, which Ray then refuses."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        # The node has the machine's memory, which is more than its type says.
        started = {name: amount for name, amount in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, started, labels)
