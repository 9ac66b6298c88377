"""The admin API: /admin/*, for holders of the admin key."""
