"""`python -m shared.migrations`: bring the database of the settings to the newest schema."""

from shared.database import migrate
from shared.settings import Settings

if __name__ == "__main__":
    migrate(Settings().sql_url)
