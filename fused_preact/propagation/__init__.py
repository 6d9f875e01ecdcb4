"""The paper's analysis of signal propagation (He et al. 2016, section 2 and 3), measured on its own networks."""

from .measure import Snapshot, UnitRecord, measure

__all__ = ["Snapshot", "UnitRecord", "measure"]
