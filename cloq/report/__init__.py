"""What a run leaves for people and for programs: report.json, layers.csv, report.html and a model card.

record   the values, and everything that is derived from them
wording  how numbers are written
tables   layers.csv and the plain lines of the command line
figures  pictures as SVG that takes its colours from the page
page     report.html, one file that asks nothing of the network
card     README.md
scores   scores on tasks, as lines
files    the four files in the folder of a run
"""

from cloq.report.files import REPORT_FILE, add_quality, add_tasks, carry_over, read_report, weight_bytes, write_report
from cloq.report.record import Report
from cloq.report.scores import comparison_dict, score_lines
from cloq.report.tables import quality_lines, summary_lines

__all__ = [
    "REPORT_FILE",
    "Report",
    "add_quality",
    "add_tasks",
    "carry_over",
    "comparison_dict",
    "quality_lines",
    "read_report",
    "score_lines",
    "summary_lines",
    "weight_bytes",
    "write_report",
]
