"""The report of a run: see `build_report`."""

from pydantic import Field

from wsss_dist.schema import StrictModel


class ReportConfig(StrictModel):
    """What the report shows."""

    num_images: int = Field(12, ge=0)  # pictures of each split, evenly spread over it
