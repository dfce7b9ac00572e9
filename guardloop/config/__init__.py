"""The configuration: its sections gathered, loaded and checked."""

from guardloop.config.describe import describe_fields, type_name
from guardloop.config.job import Settings, load_settings
from guardloop.config.platform import PlatformSettings, load_platform

__all__ = ["PlatformSettings", "Settings", "describe_fields", "load_platform", "load_settings", "type_name"]
