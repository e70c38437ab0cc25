-- $1 positions, $2 lock timeout, $3 question.
WITH deleted AS (
    DELETE FROM {table} WHERE position = ANY ($1) AND {bounded $2} RETURNING position
)
SELECT count(*) AS changed, {tag} AS statement, $3::bigint AS question FROM deleted
