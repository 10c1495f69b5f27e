"""`python -m shared.migrations`: bring the database of the settings to the newest schema."""

from shared.settings import Settings
from shared.storage.database import migrate

if __name__ == "__main__":
    migrate(Settings().sql_url)
