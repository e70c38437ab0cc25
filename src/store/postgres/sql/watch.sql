-- $1 key. Notifications cost every commit of the server: only who is waited for sends one.
UPDATE {table} r SET watched = true WHERE r.key = $1 AND r.version = 1 AND r.state = 0 AND NOT r.watched
