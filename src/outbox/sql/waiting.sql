-- $1 question.
--
-- Counts the messages that were not published yet.
SELECT count(*) AS changed, {tag} AS statement, $1::bigint AS question FROM {table}
