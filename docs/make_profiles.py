"""Writes docs/profiles.md from the profile's types, by `settings_page.py`.

`make docs` runs it; a test compares the file with the types.
"""

from __future__ import annotations

from pathlib import Path

from settings_page import settings_page

from cluster.profile import Profile

PAGE = Path(__file__).with_name("profiles.md")

HEAD = """\
# Profiles

<!-- Written by docs/make_profiles.py from cluster/profile.py. Change the text there, then run `make docs`. -->

A profile is one YAML file about a machine or a cluster. These are all its settings, with type, default and meaning. A
setting without a default has to be in the file, or in its section. An unknown key is refused, with the nearest valid
key in the message.

`--on` takes the path of such a file, or the name of one that comes with vqscale
([cluster/profiles](../cluster/profiles)). [Clusters](cluster.md) says how they are used:

```console
$ vqscale plan quickstart --on workstation
```
"""

SECTIONS = {
    "": "Profile",
    "slurm": "SlurmSettings",
    "slurm.stages.NAME": "StageSlurm",
    "ssh": "SshSettings",
    "kubernetes": "KubernetesSettings",
    "kubernetes.tolerations.N": "Toleration",
    "kubernetes.volumes.N": "Volume",
    "container": "ContainerSettings",
    "floors": "Floors",
    "network": "Network",
}
"""Dotted name of each section → its type, in the order of the page."""


def page() -> str:
    """The whole page as Markdown."""
    return settings_page(Profile, HEAD, "The profile", SECTIONS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
