"""`sdtrain doctor`: what a bug report needs to say of the machine and the installation."""

from __future__ import annotations

from sdtrain.cli.output import AsJson, print_json

# Our own code is imported inside the command, so that help does not wait for torch.


def doctor(as_json: AsJson = False) -> None:
    """Describe this machine and installation for a bug report: versions, processor, GPUs, disk, what is missing."""
    from sdtrain.preflight.machine import describe_machine

    found = describe_machine()
    if as_json:
        print_json(found)
        return
    for section, facts in found.items():
        width = max(map(len, facts), default=0)
        print(f"{section}", *(f"  {name:{width}}  {text}" for name, text in facts.items()), sep="\n")
