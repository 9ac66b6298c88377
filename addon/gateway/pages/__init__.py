"""The pages for people: /usage for who has a key, /admin/ for who has the admin key."""
