-- $1 id, $2 topic, $3 names and $4 contents of the headers, $5 payload, $6 question.
--
-- Inserts a message, unless one with the same id is waiting. Returns whether it was inserted.
WITH put AS (
    INSERT INTO {table} (id, topic, names, contents, payload) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (id) DO NOTHING
    RETURNING position
)
SELECT EXISTS (SELECT FROM put) AS changed, {tag} AS statement, $6::bigint AS question
