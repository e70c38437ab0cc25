-- $1 positions, $2 lock timeout or NULL, $3 question.
--
-- Deletes published messages. Returns one row.
WITH deleted AS (
    DELETE FROM {table} WHERE position = ANY ($1) AND {set_lock_timeout $2} RETURNING position
)
SELECT count(*) AS changed, {tag} AS statement, $3::bigint AS question FROM deleted
