-- $1 key, $2 nonce, $3 fence, $4 state: 1 unknown (a rejection), 2 tombstone, 3 kept, $5 head, $6 body, $7 retention,
-- $8 lock timeout or NULL, $9 question. Decides most completions. If it returns no row, it has changed nothing, and
-- complete.sql shows why.
UPDATE {table} r
SET state = $4, head = $5, body = $6, expires = {now} + $7
WHERE r.key = $1 AND r.version = 1 AND r.nonce = $2 AND r.fence = $3 AND r.state IN (0, 1) AND NOT {expired_now}
  AND {bounded $8}
RETURNING true AS changed, NULL::smallint AS version, CASE WHEN r.watched THEN {notify} END AS told,
    {tag} AS statement, $9::bigint AS question
