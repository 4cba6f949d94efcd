"""`msd`: a light trunk with a router and optional modality parts (docs/drafter.md).

Other methods with this network: `standard`, the control without any modality part; `msd:ar`, which drafts level by
level with experts, transfer and compressed images; `msd:subtrees`, which grows a subtree for each likely modality;
`msd:30min`, trained as long as the published methods it is compared with; `msd:video`, the drafter of the video
target, which reads event recordings.
"""

from functools import partial

from msd.drafters import registry
from msd.drafters.algorithms.msd.config import SWITCHES, MSDConfig
from msd.drafters.algorithms.msd.drafter import MSD
from msd.drafters.algorithms.msd.network import MSDNetwork
from msd.drafters.algorithms.msd.objective import DraftObjective
from msd.drafters.registry import DEFAULT, FOR_VIDEO, VIDEO, Method, learned, training_command
from msd.drafters.toolkit.growth import Shape

__all__ = ["CONTROL", "MSD", "OURS", "SHIPPED", "SWITCHES", "DraftObjective", "MSDConfig", "MSDNetwork", "Shape"]

learned("msd", objective=DraftObjective, config=MSDConfig, drafter=MSD)(MSDNetwork)
registry.add(Method("msd:sampled", partial(MSD, name="msd:sampled", sampled=True), ("msd",), form_of="msd"))
registry.add(Method("msd:subtrees", partial(MSD, name="msd:subtrees", separate=True), ("msd",), form_of="msd"))
SHIPPED, CONTROL = "msd", "standard"
OURS = ("msd:30min", "msd:15min", SHIPPED, "msd:block", "msd:ar")  # names of MSD in comparisons, by preference
_others = {
    CONTROL: "--parts none", "msd:ar": "--form ar --parts all", "msd:30min": "--weighting learned",
}  # fmt: skip
for _name, _options in _others.items():
    registry.add(Method(_name, partial(MSD, name=_name), (_name,), command=training_command(_options)))
_video = DEFAULT + FOR_VIDEO
registry.add(
    Method(
        _video,
        partial(MSD, name=_video, separate=True),
        (_video,),
        command="see recipes/events/README.md",
        target=VIDEO,
    )
)
