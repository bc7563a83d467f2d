"""Automations that mark runs without heartbeats as Crashed, since nothing else notices that their process was killed.

`python -m flows.support.automations` sets them up at PREFECT_API_URL; repeating it changes nothing.
"""

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.states import StateType

HEARTBEAT_S = 30
"""PREFECT_FLOWS_HEARTBEAT_FREQUENCY must have this value where flows run; Prefect accepts no less."""

_SILENCE = timedelta(seconds=3 * HEARTBEAT_S)
_PENDING = timedelta(minutes=10)
_ENDS = frozenset(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed"))
_FOR_EACH = frozenset({"prefect.resource.id"})

AUTOMATIONS = (
    AutomationCore(
        name="crash-silent-runs",
        description="A running flow that sends no heartbeat for 90 seconds was killed.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *_ENDS},
            for_each=set(_FOR_EACH),
            threshold=1,
            within=_SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="No heartbeat for 90 s: the process, its worker or its machine was killed. "
                "Run it again; what was finished is kept.",
            )
        ],
    ),
    AutomationCore(
        name="crash-stuck-pending-runs",
        description="A run that a worker took and did not start within 10 minutes was lost with its worker.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Pending"},
            expect={"prefect.flow-run.*"},
            for_each=set(_FOR_EACH),
            threshold=1,
            within=_PENDING,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="Pending for 10 minutes: its worker was killed before it could start it. Run it again.",
            )
        ],
    ),
)


def apply_automations(client: SyncPrefectClient) -> None:
    """Creates the automations; replaces outdated ones of the same name."""
    for wanted in AUTOMATIONS:
        there = client.read_automations_by_name(wanted.name)
        if len(there) == 1 and _same(there[0], wanted):
            continue
        for automation in there:
            client.delete_automation(automation.id)
        client.create_automation(wanted)


def _same(one: AutomationCore, other: AutomationCore) -> bool:
    return (one.enabled, one.trigger, one.actions) == (other.enabled, other.trigger, other.actions)


if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        apply_automations(client)
    print(f"Automations: {', '.join(automation.name for automation in AUTOMATIONS)}.")
