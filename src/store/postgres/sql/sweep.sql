-- $1 how many at most. Deletes what has expired; rows that somebody works on are left for the next time.
DELETE FROM {table} WHERE key IN (
    SELECT r.key FROM {table} r
    WHERE r.version = 1 AND r.expires <= {now} AND {expired_now}
    ORDER BY r.expires
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)
