"""`python -m shared.migrations`: bring the database of the settings to the newest schema."""

from shared.file_modes import keep_files_private
from shared.settings import Settings, read_settings
from shared.storage.database import migrate

if __name__ == "__main__":
    settings = read_settings(Settings)
    keep_files_private(settings.umask)
    migrate(settings.sql_url)
