"""What experiments share: offline models and data, metrics, benches, studies, HTML reports and sweeps.

Import the module you need, such as ``from looseleaf_lab import models``; nothing heavy is imported here.
"""

__version__ = "0.3.0"
